"""Builds evit_ext._C, the module that carries the operators. Metadata stands in pyproject.toml.

Environment:
    FORCE_CUDA            1: build the CUDA code or fail; 0: do not build it. Otherwise it is built where
                          torch has CUDA and a toolkit of the same major version is found.
    CUDA_HOME             the toolkit to use.
    TORCH_CUDA_ARCH_LIST  architectures, as for every torch extension, e.g. "8.0;9.0+PTX" or native.
    CXX, MAX_JOBS         the compiler; the number of parallel jobs, 1 or more.
    EVIT_NAME_VARIANT     1: the version names what is built, as torch's do: 0.1.0+cpu, 0.1.0+cu130.

No network, no GPU. Every choice and every flag is printed (`pip install -v`).
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
BUILD = json.loads((ROOT / "csrc" / "build.json").read_text())


def stop(sentence):
    """End the build with one sentence that says what to do."""
    raise SystemExit(f"\nevit_ext: error: {sentence}\n")


def say(line):
    print(f"evit_ext: {line}", flush=True)


try:
    import torch
except ImportError as error:
    if error.name != "torch":
        stop(f"torch is needed to build, and the one that is installed cannot be imported: {error}")
    stop("torch is needed to build: run `pip install torch`, or leave out --no-build-isolation.")


def check_torch():
    oldest = (2, 10)
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < oldest:
        stop(
            f"torch 2.10 or newer is needed, this is {torch.__version__}: run `pip install --upgrade torch`."
        )


def version():
    """The version that pyproject.toml states (no TOML reader before Python 3.11)."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(r'^version = "([^"]+)"', text, re.MULTILINE).group(1)


def local_version(cuda):
    """What is appended to the version: "+cpu" or "+cu130" if EVIT_NAME_VARIANT asks for it, else ""."""
    asked = os.environ.get("EVIT_NAME_VARIANT", "")
    if asked not in ("", "0", "1"):
        stop(f"EVIT_NAME_VARIANT must be 0 or 1, got {asked!r}.")
    if asked != "1":
        return ""
    return f"+cu{cuda[1][0]}{cuda[1][1]}" if cuda else "+cpu"


def check_folder():
    if not os.access(ROOT, os.W_OK):
        stop(
            f"the folder of the sources, {ROOT}, cannot be written to, and setuptools builds in it: copy it "
            "somewhere else, or build from a source distribution, which pip unpacks itself."
        )


def check_compiler():
    if not os.environ.get("CXX", "c++").strip():
        del os.environ["CXX"]  # set to nothing, which torch takes for a name
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        stop(
            f"no C++ compiler `{compiler}` found: install one (Debian, Ubuntu: `apt install g++`; "
            "Fedora: `dnf install gcc-c++`; macOS: `xcode-select --install`) or name it in CXX."
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        stop(
            f"Python's headers are missing ({header}): install them (Debian, Ubuntu: `apt install "
            "python3-dev`; Fedora: `dnf install python3-devel`)."
        )


def toolkit_version(home):
    """(major, minor) of the CUDA toolkit in `home`, or None where there is no complete one."""
    nvcc = Path(home) / "bin" / "nvcc"
    if not nvcc.exists() or not (Path(home) / "include" / "cuda_runtime.h").exists():
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def toolkit_candidates():
    """Folders that may hold a CUDA toolkit, the likeliest first."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield os.environ[name]
    nvcc = shutil.which("nvcc")
    if nvcc:
        # The nvcc on PATH may be a wrapper script somewhere else: the compiler itself knows where it lives.
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        here = re.search(r"^#\$ _HERE_=(.+)$", dry_run.stderr, re.MULTILINE)
        if here:
            yield str(Path(here[1]).parent)
        yield str(Path(nvcc).resolve().parent.parent)
    yield "/usr/local/cuda"
    yield from sorted(glob.glob("/usr/local/cuda-*"), reverse=True)


def find_toolkit():
    """(folder, version) of a toolkit that fits torch, or (None, reason)."""
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    wanted = int(torch.version.cuda.split(".")[0])
    seen = []
    for home in toolkit_candidates():
        found = toolkit_version(home)
        if found and found[0] == wanted:
            return home, found
        if found and home not in seen:
            seen.append(f"{found[0]}.{found[1]} in {home}")
    other = f" (found {', '.join(dict.fromkeys(seen))})" if seen else ""
    return None, f"torch {torch.__version__} needs a CUDA {wanted} toolkit and there is none{other}"


def choose_cuda():
    """The toolkit to build with, or None."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        stop(f"FORCE_CUDA must be 0 or 1, got {force!r}.")
    if force == "0":
        say("CUDA: off (FORCE_CUDA=0)")
        return None
    home, found = find_toolkit()
    if home is None:
        if force == "1":
            stop(f"FORCE_CUDA=1, but {found}: install a fitting toolkit or set CUDA_HOME to one.")
        say(f"CUDA: off ({found})")
        return None
    say(f"CUDA: on (toolkit {found[0]}.{found[1]} in {home}, torch for {torch.version.cuda})")
    return home, found


def architectures(toolkit):
    """The TORCH_CUDA_ARCH_LIST to use: the user's, else those of build.json that the toolkit knows.

    Containers come with lists that begin before compute capability 8.0, which the kernels need: bfloat16 and
    asynchronous copies would not assemble. Those are left out.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if asked == ["native"]:
        if not torch.cuda.is_available():
            stop(
                "TORCH_CUDA_ARCH_LIST is native, and torch sees no GPU here: name the compute capability "
                "to build for, such as 9.0, or leave the variable out."
            )
        gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        asked = sorted({f"{major}.{minor}" for major, minor in gpus})
    if asked:
        # Names such as Hopper are torch's to know.
        known = re.compile(r"\d+\.\d[af]?(\+PTX)?|[A-Z][A-Za-z0-9+]+")
        unknown = [arch for arch in asked if not known.fullmatch(arch)]
        if unknown:
            stop(
                f"TORCH_CUDA_ARCH_LIST has {' '.join(unknown)[:100]}: expected compute capabilities such as "
                '"8.0;9.0+PTX", or native.'
            )
        too_old = [arch for arch in asked if re.match(r"[1-7]\.\d", arch)]
        if len(too_old) == len(asked):
            stop(
                f"TORCH_CUDA_ARCH_LIST is {' '.join(asked)}, but the CUDA kernels need compute capability "
                "8.0 or newer: name such a one, or build without CUDA (FORCE_CUDA=0)."
            )
        if too_old:
            say(f"CUDA: without {' '.join(too_old)} of TORCH_CUDA_ARCH_LIST: the kernels need 8.0 or newer")
        return ";".join(arch for arch in asked if arch not in too_old)
    newest = 12.0 if toolkit >= (12, 8) else 9.0
    known = [arch.removesuffix("+PTX") for arch in BUILD["cuda_architectures"]]
    # PTX of the last one, so that later GPUs can run the code.
    return ";".join(arch for arch in known if float(arch) <= newest) + "+PTX"


def limit_jobs():
    """Set MAX_JOBS, unless it is set: one job for each core and for each 2 GiB of free memory."""
    asked = os.environ.get("MAX_JOBS", "").strip()
    if asked and not re.fullmatch("0*[1-9][0-9]*", asked):
        stop(f"MAX_JOBS must be a whole number, 1 or more, got {asked[:100]!r}.")
    if not asked:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = Path("/proc/meminfo")
        gib = cores * 2
        if memory.exists():
            available = re.search(r"MemAvailable:\s+(\d+) kB", memory.read_text())
            gib = int(available[1]) / 2**20 if available else gib
        container = Path("/sys/fs/cgroup/memory.max")
        if container.exists() and container.read_text().strip().isdigit():
            gib = min(gib, int(container.read_text()) / 2**30)
        os.environ["MAX_JOBS"] = str(max(1, min(cores, int(gib / 2))))
    say(f"jobs: {os.environ['MAX_JOBS']}")


def cuda_settings(home, found):
    """What the extension needs for the CUDA code: sources, macros, include and library folders, libraries."""
    arch_list = os.environ["TORCH_CUDA_ARCH_LIST"]
    macros = [
        ("USE_CUDA", None),
        ("EVIT_CUDA_VERSION", f'"{found[0]}.{found[1]}"'),
        ("EVIT_CUDA_ARCHITECTURES", f'"{arch_list}"'),
    ]
    # The static runtime: the module then also loads beside a torch for another CUDA, or for none.
    static = glob.glob(f"{home}/lib*/libcudart_static.a")
    static += glob.glob(f"{home}/targets/*/lib/libcudart_static.a")
    if static:
        library_dir, libraries = os.path.dirname(static[0]), ["cudart_static", "rt", "dl", "pthread"]
    else:
        say("CUDA: no libcudart_static.a in the toolkit, linking with libcudart.so")
        library_dir, libraries = os.path.join(home, "lib64"), ["cudart"]
    say(f"CUDA: architectures {arch_list}")
    return BUILD["cuda_kernels"], macros, os.path.join(home, "include"), library_dir, libraries


def extension(cuda):
    """The extension module, with the CUDA code of the toolkit `cuda`, or without any for None."""
    if cuda:
        os.environ["CUDA_HOME"] = cuda[0]  # read when torch.utils.cpp_extension is imported
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(cuda[1])
    from torch.utils.cpp_extension import CppExtension

    standard = f"-std=c++{BUILD['cxx_standard']}"
    flags = {
        "cxx": [standard, *BUILD["cxx_flags"], "-g0", f"-ffile-prefix-map={ROOT}/="],
        "nvcc": [standard, *BUILD["nvcc_flags"]],
    }
    sources = BUILD["kernels"] + BUILD["adapter"] + BUILD["module"]
    macros = [
        ("EVIT_VERSION", f'"{version()}{local_version(cuda)}"'),
        ("EVIT_TORCH_VERSION", f'"{torch.__version__}"'),
    ]
    include_dirs, library_dirs, libraries = [], [], []
    try:
        import pybind11

        include_dirs.append(pybind11.get_include())
    except ImportError:
        pass  # torch carries a copy of pybind11's headers
    say(f"C++: {os.environ.get('CXX', 'c++')} {' '.join(flags['cxx'])}")
    if cuda:
        cuda_sources, cuda_macros, include_dir, library_dir, cuda_libraries = cuda_settings(*cuda)
        sources += cuda_sources
        macros += cuda_macros
        include_dirs.append(include_dir)
        library_dirs.append(library_dir)
        libraries += cuda_libraries
        say(f"CUDA: nvcc {' '.join(flags['nvcc'])}")
    headers = [p for kind in ("*.h", "*.cuh", "*.inc") for p in sorted((ROOT / "csrc").rglob(kind))]
    return CppExtension(
        "evit_ext._C",
        sources,
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        libraries=libraries,
        define_macros=macros,
        extra_compile_args=flags,
        # Symbols of static libraries stay inside: another extension may link another version of the runtime.
        extra_link_args=["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [],
        depends=["csrc/build.json", *(str(header.relative_to(ROOT)) for header in headers)],
    )


def main():
    check_torch()
    check_folder()
    check_compiler()
    limit_jobs()
    cuda = choose_cuda()
    ext = extension(cuda)  # first: it sets CUDA_HOME, which torch.utils.cpp_extension reads on import
    from torch.utils.cpp_extension import BuildExtension

    class EggInfo(egg_info):
        """Appends the local version. Not by setup's `options`, which the setup.cfg in an sdist overrides."""

        def finalize_options(self):
            self.tag_build = local_version(cuda)
            super().finalize_options()

    setup(ext_modules=[ext], cmdclass={"build_ext": BuildExtension, "egg_info": EggInfo})


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Build the source distribution and, from it, wheels; check each wheel and try it in a fresh environment.

    scripts/build-wheels.py [--python python3.12 ...] [--variant cpu ...]

A Python that has torch, timm and pybind11 builds with them; for any other, pip downloads the newest torch.
The wheels that passed are put into dist/. Exit status: 0 if all passed, else 1.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK, DIST = ROOT / "build" / "wheels", ROOT / "dist"
FORCE_CUDA = {"cpu": "0", "cuda": "1"}
# They belong to the torch that is installed, whichever that is.
NOT_BUNDLED = ["--exclude=libtorch*.so*", "--exclude=libc10*.so*", "--exclude=libcudart.so*"]
PACKAGES = (
    "import pybind11, sys, timm, torch; print(*[p for p in sys.path if p.endswith('-packages')], sep='\\n')"
)
SMOKE = """
import sys, torch, evit_ext
from evit_ext import _C, models, ops
assert evit_ext.__file__.startswith(sys.argv[1]), evit_ext.__file__
assert _C.build_info()["cuda_operators"] is (sys.argv[2] == "cuda"), _C.build_info()
q, k, x = torch.randn(3, 4, 32), torch.randn(3, 4, 197, 32), torch.randn(3, 197, 128)
scores = ops.class_attention(q, k)
torch.testing.assert_close(scores, ops.reference.class_attention(q, k))
tokens = ops.reorganize_tokens(x, scores, 99)
torch.testing.assert_close(tokens, ops.reference.reorganize_tokens(x, scores, 99))
models.deit_tiny(keep_rate=0.7)(torch.randn(2, 3, 224, 224)).sum().backward()
print(f"evit_ext {evit_ext.__version__} works with torch {torch.__version__}")
"""


def run(*command: object, **environment: str) -> str:
    """Run a command and return its output. Raises RuntimeError with the output if it fails."""
    folders = [shutil.which(str(command[0])) or sys.executable, sys.executable]
    path = os.pathsep.join([*(str(Path(program).parent) for program in folders), os.environ["PATH"]])
    settings = {**os.environ, "PATH": path, **environment}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=WORK, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:4])} ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def build(python: str, variant: str, sdist: Path) -> str:
    """Build, check and try a wheel, and put it into dist/. Returns what was seen. Raises RuntimeError."""
    folder = WORK / f"{Path(python).name}-{variant}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        packages = run(python, "-c", PACKAGES)
    except RuntimeError:
        packages = ""
    options = ["--no-deps", "--no-cache-dir", *(["--no-build-isolation"] if packages else [])]
    settings = {"FORCE_CUDA": FORCE_CUDA[variant], "EVIT_NAME_VARIANT": "1"}
    run(python, "-m", "pip", "wheel", *options, "--wheel-dir", folder / "built", sdist, **settings)
    run("auditwheel", "repair", *NOT_BUNDLED, "--wheel-dir", folder, *(folder / "built").glob("*.whl"))
    (wheel,) = folder.glob("*.whl")
    run("twine", "check", "--strict", wheel)
    shutil.unpack_archive(wheel, folder / "unpacked", "zip")
    (module,) = (folder / "unpacked" / "evit_ext").glob("_C*.so")
    report = json.loads(run("torch-abi-audit", "--check", "torch", "--json", module))
    oldest = report["extensions"][0]["torch"]["min_torch_version"]
    if [int(number) for number in oldest.split(".")[:2]] > [2, 10]:
        raise RuntimeError(f"the module needs torch {oldest}, but 2.10 is promised")
    run(python, "-m", "venv", folder / "trial")
    trial = folder / "trial" / "bin" / "python"
    # What is installed for `python` comes after the environment's own packages. Its .pth files are not read,
    # so that an evit_ext which is installed there in editable mode stays out.
    next((folder / "trial" / "lib").glob("python*/site-packages/pip")).with_name("p.pth").write_text(packages)
    run(trial, "-m", "pip", "install", *(["--no-deps", "--no-index"] if packages else []), wheel)
    seen = run(trial, "-I", "-c", SMOKE, folder / "trial", variant)
    shutil.copy2(wheel, DIST)
    return f"{wheel.name}: {seen.strip()}"


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--python", action="append", help="default: those of python3.10 to python3.14 that run"
    )
    parser.add_argument("--variant", action="append", choices=list(FORCE_CUDA), help="default: both")
    options = parser.parse_args()
    for folder in (WORK, DIST):
        folder.mkdir(parents=True, exist_ok=True)
    backend = (
        "import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta as b; b.build_sdist('dist')"
    )
    run(sys.executable, "-c", backend, ROOT, FORCE_CUDA="0")
    sdist = max(DIST.glob("*.tar.gz"), key=os.path.getmtime)
    run("twine", "check", "--strict", sdist)
    pythons, failed = options.python or [], False
    for python in [] if pythons else [f"python3.{minor}" for minor in range(10, 15)]:
        if shutil.which(python) and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            pythons.append(python)
        else:
            print(f"{python}: not found")
    for python, variant in itertools.product(pythons, options.variant or FORCE_CUDA):
        try:
            result = build(python, variant, sdist)
        except (RuntimeError, OSError) as error:
            failed, result = True, f"FAILED: {error}"
        print(f"{python}, {variant}: {result}", flush=True)
    return 1 if failed or not pythons else 0


if __name__ == "__main__":
    sys.exit(main())

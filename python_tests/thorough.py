"""The tests that `make test` leaves to `make test-all`: they start processes, compile or build for seconds.

Each guards something that others guard too, in a smaller way, or that changes rarely. They are marked here
and not where they are, so that one sees what is left out. A line is a file, or a test with its parameters.
"""

from __future__ import annotations

THOROUGH = (
    # A whole model or package is compiled.
    "cpu/test_cpu_inference.py::test_compiled",
    "cost/test_depth.py::test_against_trying_all",
    "export/test_cmake_package.py",
    "export/test_cpp_example.py",
    "export/test_export_model.py::test_aoti_runs_with_the_operators_alone",
    "export/test_engines.py::test_in_engine",
    "export/test_engines.py::test_in_torch_compile",
    "export/test_int8.py::test_files",
    "models/test_deit.py::test_compile_at_two_sizes",
    "models/test_deit_distilled.py::test_compile_at_two_sizes",
    "models/test_lvvit.py::test_compile_at_two_sizes",
    "models/test_lvvit.py::test_compile_with_dynamic_batch",
    "patching/families/test_family_uses.py::test_compiles_without_a_graph_break",
    "patching/families/test_huggingface.py::test_compiles_without_a_graph_break",
    "patching/test_token_sizes.py::test_blocks_compiled_one_by_one",
    "patching/test_token_sizes.py::test_compiled",
    "tools/test_build.py",
    "tools/test_cubins.py",
    "tools/test_distribution.py",
    "tools/test_ptx.py",
    # Trainings, evaluations and servers of their own, some of them killed.
    "benchmark/test_apart.py",
    "benchmark/test_measure_engines.py::test_rows",
    "benchmark/test_measure.py::test_memory_that_a_call_adds",
    "cli/test_benchmark.py::test_engines",
    "cli/test_evaluate.py::test_an_exported_file",
    "cli/test_evaluate.py::test_engines",
    "cli/test_export.py::test_int8",
    "cli/test_main.py::test_threads_sleep_while_they_wait",
    "cli/test_output.py",
    "study/test_study.py",
    "training/run/test_run.py::test_kinds_of_runs",
    "training/run/test_run.py::test_photographs_and_digits",
    "training/run/test_run.py::test_the_same_with_more_processes",
    "training/test_evaluation.py::test_several_processes_find_what_one_finds",
    "training/test_faults.py",
    "training/test_loaders_faults.py",
    "training/run/test_stopping.py::test_a_collective_that_never_ends",
    "training/run/test_stopping.py::test_a_step_may_take_as_long_as_those_before",
    "training/test_ranks.py",
    # Commands of the documentation, benchmarks and scripts, on stand-ins.
    "docs/test_shell_blocks.py::test_runs",
    "docs/test_site.py",
    "tools/test_benchmarks.py",
    "tools/test_core_dependencies.py",
    "tools/test_end_to_end_benchmark.py",
    "tools/test_engines_benchmark.py::test_profiles",
    "tools/test_growth_benchmark.py",
    "tools/test_training_benchmark.py",
    "tools/test_vision_towers_benchmark.py",
)


def is_thorough(node: str) -> bool:
    """Return whether a test's node id, such as "python_tests/a/test_b.py::test_c[d]", is in the list."""
    inside = node.partition("python_tests/")[2].partition("[")[0]
    return inside in THOROUGH or inside.partition("::")[0] in THOROUGH

"""Which tests run on every kernel, and how: the same on this machine and in guests."""

from __future__ import annotations

__all__ = ["ENVIRONMENT_TESTS", "LESS", "SAMPLE", "SLOWNESS", "TESTS", "arguments"]

TESTS = (
    "tests/kernel",
    *(
        f"tests/hooks/test_{name}.py"
        for name in (
            "adopted_sockets", "cgroup", "interfaces", "iterators", "namespaces", "old_attachments", "sleepable",
            "slots", "sockets", "struct_ops", "without_links", "without_tcx",
        )
    ),
    *(
        f"tests/upgrade/test_{name}.py"
        for name in (
            "apply", "cgroup_storage", "copy_errors", "folds", "inner_maps", "map_types", "mirror", "plans",
            "program_types", "recover", "secure", "sockets", "split_maps", "taken_away", "taken_back", "under_fire",
            "verify",
        )
    ),
    "tests/adopt",
    "tests/cli/test_doctor.py",
)  # fmt: skip
"""What a whole matrix runs, chosen for what differs between kernels and for what an emulated one does in half an hour.

The main job, an upgrade under traffic with exact counters, is test_under_fire.py. Left out is test_storage.py, whose
own programs neither kernel takes: they have storage of tasks at a hook of cgroups.
"""

SAMPLE = (
    "tests/cli/test_doctor.py",
    "tests/kernel/test_base.py",
    "tests/kernel/test_copier.py",
    "tests/upgrade/test_taken_away.py",
    "tests/upgrade/test_under_fire.py::test_no_increment_is_lost_or_gained_while_upgrades_go_back_and_forth",
)
"""What fits into three minutes."""

LESS = "lockdown=confidentiality nohz_full=1 sysctl.kernel.modules_disabled=1 sysctl.net.core.bpf_jit_harden=2"
"""The command line of a kernel that has less: it tells nobody what is in its memory, leaves one CPU alone, takes no
modules, and hides the constants of programs. What runs on it is the sample."""

ENVIRONMENT_TESTS = (
    "tests/kernel",
    "tests/layout",
    "tests/cli/test_check.py",
    "tests/cli/test_init.py",
    "tests/hooks/test_struct_ops.py",
    "tests/upgrade/test_apply.py",
    "tests/upgrade/test_globals.py",
    "tests/upgrade/test_map_types.py::test_what_cannot_be_carried_is_a_loss_that_somebody_must_allow",
    "tests/upgrade/test_program_types.py",
    SAMPLE[-1],
)
"""What runs with each Python and each libbpf on this machine's kernel: what they could change, in about three minutes.

Readers of objects, the commands, and what libbpf does: loading, global data, arenas, types of programs, struct_ops.
"""

SLOWNESS = 20.0
"""How many times longer an emulated machine may take, when two of them share two CPUs."""


def arguments(tests: tuple[str, ...]) -> list[str]:
    """What pytest is given: every line that says how a test ended is progress too."""
    options = ["-v", "--color=no", "--tb=short", "-p", "no:cacheprovider", "-p", "tests.matrix.facts"]
    return [*options, "-o", "junit_logging=no", "-m", "not timing and not host", *tests]

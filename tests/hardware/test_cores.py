"""As many threads as cores that a process can keep busy."""

from pathlib import Path

import pytest

from lit_gpt.cores import usable_cores


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


SIBLINGS = {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}\n" for i in range(8)}
CGROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "cpus", "cores"),
    [
        ({}, set(range(8)), 8),
        (SIBLINGS, set(range(8)), 4),
        (SIBLINGS, {0, 4}, 1),
        ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "max 100000\n"}, set(range(8)), 8),
        ({"proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "250000 100000\n"}, set(range(8)), 3),
        ({"proc/self/cgroup": "0::/a/b\n", f"{CGROUP}/a/cpu.max": "20000 100000\n"}, set(range(8)), 1),
        ({"proc/self/cgroup": "4:memory:/x\n1:cpu:/a\n", f"{CGROUP}/cpu/a/cpu.cfs_quota_us": "-1"}, set(range(8)), 8),
        (
            {
                "proc/self/cgroup": "1:cpu,cpuacct:/a\n",
                f"{CGROUP}/cpu,cpuacct/cpu.cfs_quota_us": "200000",
                f"{CGROUP}/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            set(range(8)),
            2,
        ),
    ],
)
def test_cores_are_those_of_the_set_and_of_the_containers_limit(tmp_path, files, cpus, cores):
    assert usable_cores(system(tmp_path, files), cpus) == cores


def test_of_this_system_some_are_usable():
    assert usable_cores() >= 1

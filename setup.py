"""What pyproject.toml cannot say: the cffi module, that nothing is packed before it is complete, and same bytes."""

import gzip
import os
import sys
import tarfile
import time
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

_BPF, _SHARE = Path("src/meshd/bpf"), Path("packaging/share")


def _require_what_is_made() -> None:
    """A package that lacks an object would be found out on the node, at its first upgrade."""
    missing = [source for source in sorted(_BPF.glob("*/*.bpf.c")) if not source.with_suffix(".o").exists()]
    if missing:
        names = ", ".join(str(source.with_suffix(".o")) for source in missing)
        sys.exit(f"setup.py: not compiled: {names}; say `make dist`, or first `make -C {_BPF}`, which wants clang-19")
    if not list(_SHARE.glob("man/man1/*.1")):
        sys.exit(f"setup.py: no man pages in {_SHARE}: say `make dist`, or first `make man`")


class _BuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            _require_what_is_made()
        super().run()


class _Sdist(sdist):
    def run(self) -> None:
        _require_what_is_made()
        super().run()

    def make_archive(self, base_name: str, format: str, *_where: object, base_dir: str = ".", **_who: object) -> str:
        """Same files, same archive: setuptools' own has the hour, the user and the umask of whoever packs."""
        epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime = 0, 0, "", "", epoch
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path = f"{base_name}.tar.gz"
        with (
            Path(path).open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as packed,
            tarfile.open(mode="w", fileobj=packed) as archive,
        ):
            archive.add(base_dir, filter=plain)
        return path


setup(
    cffi_modules=["src/hitless/kernel/libbpf_build.py:ffi"],
    cmdclass={"build_py": _BuildPy, "sdist": _Sdist},
)

"""Builds the wheel: the library, made by cargo, and the declarations, made from its header."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROFILE = os.environ.get("VMBED_PROFILE", "release")


def library() -> Path:
    """The shared library: the one that VMBED_LIBRARY names, or what cargo builds (VMBED_PROFILE: release, debug)."""
    given = os.environ.get("VMBED_LIBRARY")
    if given:
        return Path(given)
    # Cargo leaves link-time optimization out where it makes an rlib as well.
    command = ["cargo", "rustc", "--lib", "--crate-type", "cdylib"] if PROFILE == "release" else ["cargo", "build", "--lib"]
    command += ["--release"] if PROFILE == "release" else []
    subprocess.run(command, cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return (ROOT / target / PROFILE / "libvmbed.so").resolve()


class Build(build_py):
    """Puts the library into the package."""

    def run(self) -> None:
        super().run()
        package = Path(self.build_lib) / "vmbed"
        package.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library(), package / "libvmbed.so.0")


class Binary(Distribution):
    """A wheel for one platform: it carries a library."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": Build}, distclass=Binary, cffi_modules=["cdef.py:ffi"])

"""Packaging hook: compiles nothing unless STABLEKERN_PREBUILD=1, which puts the native library into the wheel."""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class PrebuildNative(build_ext):
    """Build with the sources and flags of `stablekern/_build.py`, the same that a first use would take."""

    def build_extension(self, ext: Extension) -> None:
        path = Path(__file__).parent / "stablekern" / "_build.py"
        spec = importlib.util.spec_from_file_location("_stablekern_build", path)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        library = build.compile_into(work, os.environ.get("STABLEKERN_MARCH", "x86-64-v3"))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


prebuild = os.environ.get("STABLEKERN_PREBUILD") == "1"
setup(
    ext_modules=[Extension("stablekern._native", sources=[])] if prebuild else [],
    cmdclass={"build_ext": PrebuildNative},
)

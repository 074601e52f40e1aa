# SPDX-License-Identifier: Apache-2.0
"""Builds the operators with CMake against the torch that is installed, and puts them beside the
Python files. CMAKE_ARGS in the environment reaches CMake, as in CMAKE_ARGS=-DCOHORT_CUDA=OFF. What
is built on the way lies in the repository's build/python, in a folder for each torch and each
CMAKE_ARGS: CMake keeps what it was told once."""

import hashlib
import os
import shlex
import subprocess

import torch
from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.abspath(os.path.join(HERE, "..", "..", "build", "python"))
os.makedirs(BUILD, exist_ok=True)


def native_folder(told):
    """Where CMake builds that is `told` so."""
    return os.path.join(BUILD, "native-" + hashlib.sha256("\0".join(told).encode()).hexdigest()[:12])


class Build(build_py):
    def run(self):
        super().run()
        folder = os.path.abspath(os.path.join(self.build_lib, "cohort"))
        told = [f"-DTORCH_ROOT={os.path.dirname(torch.__file__)}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        native = native_folder([torch.__version__, *told])
        subprocess.check_call(["cmake", "-S", HERE, "-B", native, *told])
        subprocess.check_call(["cmake", "--build", native, "--target", "cohort_torch_operators"])


class OfOnePlatform(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": Build}, distclass=OfOnePlatform,
      options={"build": {"build_base": BUILD}, "egg_info": {"egg_base": BUILD}})

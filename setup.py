"""Builds lstm_fast._C with ninja: C++ for the CPU always, CUDA where nvcc is found.

LSTM_FAST_CUDA=0|1 leaves CUDA out, or insists on it; LSTM_FAST_CUDA_ARCHS="80;90a" chooses architectures; CXX, CXXFLAGS
and LDFLAGS mean what they always do.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError, SetupError

ROOT = Path(__file__).resolve().parent
# sm_80 code runs on every 8.x card, sm_90a on Hopper, sm_100 on 10.x; later cards compile the PTX of the newest.
CUDA_ARCHS = ("80", "90a", "100")
GCC = 11  # the oldest that knows all instruction sets in csrc/cpu/vectors.h
CLUSTERS_NVCC = (12, 8)  # the oldest that knows all of the PTX in csrc/cuda/simt.h
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def find_cxx() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise PlatformError(f"lstm_fast needs a C++17 compiler, and {shlex.join(named) or 'g++'} was not found")


def find_nvcc() -> str | None:
    """The path of nvcc; None if CUDA is to be left out."""
    wish = os.environ.get("LSTM_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SetupError(f"LSTM_FAST_CUDA should be 0 or 1, got: {wish!r}")
    if wish == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    search = os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=search)
    if nvcc is None and wish == "1":
        raise PlatformError("LSTM_FAST_CUDA=1 needs nvcc, which is neither in CUDA_HOME/bin nor on PATH")
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """Those asked for, else those of CUDA_ARCHS that this nvcc knows."""
    asked = os.environ.get("LSTM_FAST_CUDA_ARCHS", "")
    known = set(re.findall(r"\d+", output([nvcc, "--list-gpu-code"])))
    archs = asked.replace(",", ";").split(";") if asked else [a for a in CUDA_ARCHS if a.rstrip("a") in known]
    unknown = [a for a in archs if not re.fullmatch(r"\d+[af]?", a) or a.rstrip("af") not in known]
    if unknown or not archs:
        raise SetupError(f"{nvcc} compiles for {', '.join(sorted(known, key=int))}, not for {', '.join(unknown)}")
    return archs


def gencode(archs: list[str]) -> list[str]:
    newest = max((a.rstrip("af") for a in archs), key=int)  # PTX with a suffix would not serve later cards
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


class NinjaBuild(build_ext):
    """Compiles the one extension with ninja, as many files at a time as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import ninja
            import pybind11
            from ninja import ninja_syntax
        except ImportError as error:
            raise PlatformError(f"building lstm_fast needs {error.name}: pip install {error.name}") from None
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise PlatformError("building lstm_fast needs Python's headers (python3-dev or python3-devel)")
        cxx, nvcc = find_cxx(), find_nvcc()
        includes = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()]
        flags = [*CXX_FLAGS, *(f"-I{path}" for path in dict.fromkeys(includes))]
        # torch brings the OpenMP runtime, so it isn't linked; torch's is GCC's, and clang would ask for another.
        if "clang" not in output([*cxx, "--version"]):
            found = output([*cxx, "-dumpversion"]).strip()
            if re.match(r"\d+", found) and int(found.partition(".")[0]) < GCC:
                raise PlatformError(f"lstm_fast needs GCC {GCC} or newer, and {shlex.join(cxx)} is {found}")
            flags.append("-fopenmp")
        elif platform.machine() == "x86_64":  # it calls no function whose vectors its caller doesn't have, even inlined
            raise PlatformError(f"lstm_fast's kernels for x86 need GCC {GCC} or newer, and {shlex.join(cxx)} is clang")
        linker, rules = [*cxx, "-shared"], {}
        if nvcc is not None:
            archs = cuda_archs(nvcc)
            version = nvcc_version(nvcc)
            flags += ["-DLSTM_FAST_WITH_CUDA", f'-DLSTM_FAST_CUDA_ARCHS="{";".join(archs)}"']
            flags.append(f'-DLSTM_FAST_NVCC_VERSION="{".".join(map(str, version))}"')
            nvcc_flags = [*NVCC_FLAGS, "-ccbin", cxx[-1]]
            rules["cuda"] = [nvcc, *nvcc_flags, *gencode(archs)]
            clustered = [arch for arch in archs if has_clusters(arch)] if version >= CLUSTERS_NVCC else []
            if clustered:
                flags.append("-DLSTM_FAST_WITH_CLUSTERS")
                rules["clusters"] = [nvcc, *nvcc_flags, *gencode(clustered)]
            linker = [nvcc, "-shared", "-cudart", "static", "--no-device-link", "-ccbin", cxx[-1]]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        linker += link_flags if nvcc is None else ["-Xcompiler=" + flag.replace(",", r"\,") for flag in link_flags]

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with (build / "build.ninja").open("w") as file:
            writer = ninja_syntax.Writer(file)
            rules["cxx"] = [*cxx, *flags]
            for rule, command in rules.items():
                line = f"{escape(shlex.join(command))} -MMD -MF $out.d -c $in -o $out"
                writer.rule(rule, line, "compiling $in", depfile="$out.d", deps="gcc")
            writer.rule("link", f"{escape(shlex.join(linker))} $in -o $out", "linking $out")
            objects = []
            for source in map(Path, ext.sources):
                rule = "cxx"
                if source.suffix == ".cu":
                    rule = "clusters" if source.name.startswith("persistent") else "cuda"
                if rule in rules:
                    out = escape_path(source.with_suffix(source.suffix + ".o"))
                    objects += writer.build(out, rule, escape_path(ROOT / source))
            writer.build(escape_path(target), "link", objects)
        if subprocess.run([str(Path(ninja.BIN_DIR, "ninja")), "-C", str(build)], check=False).returncode != 0:
            hint = "" if nvcc is None else "; LSTM_FAST_CUDA=0 leaves CUDA out"
            raise CompileError(f"a compiler failed on lstm_fast, with the messages above{hint}")


def nvcc_version(nvcc: str) -> tuple[int, ...]:
    found = re.search(r"release ([\d.]+)", output([nvcc, "--version"]))
    return tuple(map(int, found[1].split("."))) if found else (0,)


def has_clusters(arch: str) -> bool:
    """Whether cards of this architecture have thread-block clusters."""
    return int(arch.rstrip("af")) >= 90


def escape(command: str) -> str:
    return command.replace("$", "$$")


def escape_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if sys.platform != "linux":
    raise SystemExit(f"lstm_fast's kernels build on Linux, and this is {sys.platform}")
if int(__version__.split(".")[0]) < 77:
    raise SystemExit(f"building lstm_fast needs setuptools 77 or newer, not {__version__}: pip install -U setuptools")
found = [path for pattern in ("*.cpp", "*.cu") for path in sorted((ROOT / "csrc").glob(f"*/{pattern}"))]
sources = ["csrc/bindings.cpp", *(str(path.relative_to(ROOT)) for path in found)]
setup(ext_modules=[Extension("lstm_fast._C", sources)], cmdclass={"build_ext": NinjaBuild})

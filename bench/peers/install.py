"""Installs what bench/peers compares with: Python packages into build/peers-venv, and the
development files of oneDNN and OpenBLAS. Nothing is required: what cannot be had is written into
build/peers-venv/peers.json with the reason, and the bench leaves it out by name.

    build/venv/bin/python bench/peers/install.py
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parents[2] / "build" / "peers-venv"
PYTHON = VENV / "bin" / "python"
BUILD_SECONDS = 1500  # for a package that is compiled here
SYSTEM = {"oneDNN": ("libdnnl-dev", "oneapi/dnnl/dnnl.h", "dnnl"),
          "OpenBLAS": ("libopenblas-dev", "cblas.h", "openblas")}
PACKAGES = {"OpenVINO": ("openvino", ["openvino"]),
            "ONNX Runtime": ("onnxruntime", ["onnxruntime", "onnx"]),
            "ggml": ("ggml", ["ggml-python"])}

# The default wheel of PyTorch requires gigabytes of CUDA that the processor never calls. It goes
# in without its requirements; then come those that are Python alone; and then, one by one, the CUDA
# libraries without which the loader refuses it: those that this machine does not have yet.
TORCH_PURE = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec")
TORCH_LIBRARIES = {  # how a library or symbol begins -> what its package is called
    "cudart": "cuda-runtime", "cublas": "cublas", "cudnn": "cudnn", "cufft": "cufft",
    "cufile": "cufile", "cupti": "cuda-cupti", "curand": "curand", "cusolver": "cusolver",
    "cusparseLt": "cusparselt", "cusparse": "cusparse", "nccl": "nccl", "nvshmem": "nvshmem",
    "nvrtc": "cuda-nvrtc", "nvJitLink": "nvjitlink", "nvtx": "nvtx"}


def run(*command: str | Path, seconds: float | None = None) -> tuple[bool, str]:
    """Whether a command went well, and the last line of what it said."""
    try:
        done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, text=True,
                              capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"took longer than {seconds:.0f} s"
    except OSError as error:  # before there is a virtual environment
        return False, str(error)
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    errors = [line for line in lines if "rror" in line]
    return done.returncode == 0, (errors or lines or [""])[-1][:200]


def pip(*packages: str, alone: bool = False) -> tuple[bool, str]:
    """Installs packages; alone: without what they require."""
    return run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               *(["--no-deps"] if alone else []), *packages, seconds=BUILD_SECONDS)


def imports(module: str) -> tuple[bool, str]:
    return run(PYTHON, "-c", f"import {module}")


def required_by_torch() -> dict[str, str]:
    """The versions that the installed PyTorch asks for: package -> requirement."""
    folder = next(VENV.glob("lib/python*/site-packages"))
    torch = next(iter(importlib.metadata.distributions(name="torch", path=[str(folder)])))
    found = (re.match(r"[\w.-]+(==[\w.]+)?", line) for line in torch.requires or [])
    return {match[0].split("==")[0]: match[0] for match in found if match}


def torch_package(complaint: str) -> str | None:
    """The package of the library that the loader's complaint is about."""
    name = (re.search(r"undefined symbol: (\w+)", complaint)
            or re.search(r"lib(\w+)\.so", complaint))
    stem = name[1] if name else ""
    known = next((TORCH_LIBRARIES[k] for k in TORCH_LIBRARIES if stem.startswith(k)), None)
    if known is None:
        return None
    pinned = next((requirement for package, requirement in required_by_torch().items()
                   if re.fullmatch(rf"nvidia-{known}(-cu\d+)?", package)), None)
    return pinned or f"nvidia-{known}"


def install_torch() -> tuple[bool, str]:
    """PyTorch with as little of CUDA as lets it start."""
    for packages, alone in ((("torch",), True), (TORCH_PURE, False)):
        good, why = pip(*packages, alone=alone)
        if not good:
            return good, why
    tried: set[str] = set()
    while True:
        good, why = imports("torch")
        package = None if good else torch_package(why)
        if package is None or package in tried:
            return good, why
        tried.add(package)
        print(f"peers: PyTorch wants {package}", flush=True)
        good, why = pip(package, alone=True)
        if not good:
            return good, why


def install_system() -> dict[str, str]:
    """Debian's packages; name -> why not."""
    missing = {name: package for name, (package, header, library) in SYSTEM.items()
               if not links(header, library)}
    if not missing:
        return {}
    command = f"apt-get install -y --no-install-recommends {' '.join(missing.values())}"
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (root and not shutil.which("sudo")):
        return dict.fromkeys(missing, f"its development files are missing; fix: {command}")
    print(f"peers: installing {' '.join(missing.values())}", flush=True)
    run(*root, "apt-get", "-qq", "update")
    good, why = run(*root, *command.split())
    return {} if good else dict.fromkeys(missing, f"{why}; fix: {command}")


def links(header: str, library: str) -> bool:
    """Whether the compiler finds a header and a library; another BLAS has the same header."""
    program = f"#include <{header}>\nint main(void) {{ return 0; }}\n"
    return subprocess.run(["cc", "-o", os.devnull, "-x", "c", "-", f"-l{library}"], input=program,
                          text=True, capture_output=True).returncode == 0


def main() -> int:
    if not imports("pip")[0]:
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    reasons = install_system()
    for name, (module, packages) in PACKAGES.items():
        if not all(imports(x)[0] for x in (module, *(p for p in packages if p == "onnx"))):
            print(f"peers: installing {' '.join(packages)}", flush=True)
            good, why = pip(*packages)
            if not good:
                reasons[name] = why
    if not imports("torch")[0]:
        print("peers: installing torch", flush=True)
        good, why = install_torch()
        if not good:
            reasons["PyTorch"] = why
    (VENV / "peers.json").write_text(json.dumps(reasons, indent=1) + "\n")
    for name, why in reasons.items():
        print(f"peers: {name} is left out: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

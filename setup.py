"""The part of the packaging that pyproject.toml can't say: data folders beside the package move into it."""

from setuptools import find_packages, setup

# The host wants these beside its nodes; `w2wpp.bundle` looks in both places.
BESIDE = {"models": ["*.safetensors", "README.md"], "example_workflows": ["*.png"]}

setup(
    packages=[*find_packages(include=["w2wpp*"]), *(f"w2wpp.{name}" for name in BESIDE)],
    package_dir={f"w2wpp.{name}": name for name in BESIDE},
    package_data={
        "w2wpp": ["py.typed"],
        **{f"w2wpp.{name}": files for name, files in BESIDE.items()},
    },
)

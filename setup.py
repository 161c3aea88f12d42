from setuptools import find_packages, setup

setup(
    name="sharedkd",
    version="0.1.0",
    description="Shared Knowledge Distillation for Detectron2 detectors",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "projects/SharedKD"},
    packages=find_packages("projects/SharedKD"),
    package_data={"sharedkd.lab.report": ["templates/*"]},
    # detectron2 is not on PyPI under its own name: `make setup` installs it, see README.md.
    install_requires=[
        "torch>=2.6",  # older ones run code of a file that they load as data
        "torchvision",
        "omegaconf",
        "scipy",
        "tabulate",
        "matplotlib",
        "pillow",
        "fvcore",
        "pycocotools",
        "opencv-python-headless",
        "numpy",
        "safetensors",
        "hydra-core",
        "jinja2",
        "markdown-it-py",
    ],
)

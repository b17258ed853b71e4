"""Distribution `swim-fast`: the packages `swim_fast`, with the recipes in `configs/`, and `kernels/swim_kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Bounded above since swim_fast/modeling calls the functions behind Liger's modules, whose arguments are not its public
# interface: they were checked for 0.8, and other versions are refused.
LIGER = "liger-kernel>=0.8.5,<0.9"
# transformers from 5.24 on refuses peft below 0.22, which is not released: the extra takes a pair that fits.
LORA = ["peft>=0.21", "bitsandbytes>=0.50"]
# Below 1.15 its trainer gives the model another forward, whose loss is not ours; 2 is to drop arguments.
TRL = ["trl>=1.15,<2"]
SMOLVLM = ["num2words>=0.5.14"]  # its processor writes the number of frames in words
PERCEPTION_LM = ["timm>=1.0.29"]  # its vision tower
NL_REFER = ["openai>=1.40,<4", "HanTa>=1.1,<2"]
TEST = [
    *LORA,
    *NL_REFER,
    *TRL,
    LIGER,
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "deepspeed>=0.19,<0.20",
    "av>=14",
    "torchcodec>=0.10",
    *SMOLVLM,
    *PERCEPTION_LM,
]

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "swim_fast" / "__init__.py").read_text(encoding="utf-8"), re.M)

setup(
    name="swim-fast",
    version=VERSION.group(1),
    description="Teach video language models where to look, at flash-attention speed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Method (SWIM, arXiv 2605.18018)": "https://arxiv.org/abs/2605.18018"},
    keywords=["video language models", "attention supervision", "fine-tuning", "triton", "grounding"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["swim_fast", "swim_fast.*"]), *find_packages("kernels"), "swim_fast.configs"],
    package_dir={"swim_kernels": "kernels/swim_kernels", "swim_fast.configs": "configs"},
    package_data={
        "": ["py.typed"],
        "swim_fast.configs": ["*.yaml", "deepspeed/*.json"],
        "swim_fast.nl_refer": ["synonyms.tsv"],
        "swim_fast.viz": ["*.html"],
    },
    install_requires=[
        "torch>=2.11",
        "torchvision",  # transformers' video processors resize with it
        "triton>=3.6; platform_system == 'Linux'",
        # 5.17 is the oldest release that `make test-range` runs. Its attention interface, processors and position ids
        # have changed from release to release since, in part silently; so no release that has not been tested.
        "transformers>=5.17,<5.25",
        "accelerate>=1.10",
        "decord>=0.6; platform_system == 'Linux'",
        "pycocotools>=2.0.8",
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2.8,<3",  # options of files and command lines
        "pyyaml>=6",
        "jinja2>=3.1",  # pages; the chat templates of transformers need it too
        "matplotlib>=3.8",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={
        # flash-attn's build needs torch beside it: `make install-gpu` installs in the order that works
        "cuda": ["flash-attn>=2.8", LIGER],
        "deepspeed": ["deepspeed>=0.19,<0.20"],
        "lora": [*LORA, "transformers<5.24"],
        "pyav": ["av>=14"],
        "torchcodec": ["torchcodec>=0.10"],
        "demo": ["av>=14"],  # writes the demo's H.264 clips
        "nl-refer": NL_REFER,
        "perception-lm": PERCEPTION_LM,
        "smolvlm": SMOLVLM,
        "trl": TRL,
        "test": TEST,
        "dev": [*TEST, "playwright>=1.50", "qwen-vl-utils>=0.0.14", "ruff>=0.12", "mypy>=1.18,<3"],
    },
    entry_points={"console_scripts": ["swim-fast = swim_fast.cli:main"]},
)

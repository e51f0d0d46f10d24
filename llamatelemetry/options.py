"""Which of llama-server's options load_model takes, and what becomes of each.

Two processes run the model: llama-server, which answers, and the worker, which captures. An option
that changes the model's numbers goes to both or is refused; one that changes none (beyond the
rounding of another order of computation) goes to the server. The names are those of the pinned
llama.cpp (common/arg.cpp)."""

import difflib
import os
import re
from pathlib import Path

from . import logs
from .errors import OptionError, ServerError

SYSTEM_SETTINGS = "/etc/llama.cpp/config.ini"

# Arguments of load_model and start_server that are handled there.
PARAMETERS = ("threads", "port", "host", "timeout", "embeddings", "pooling")

# No effect on the numbers: speed, memory, which processor of the server computes (captures go by
# gpu_layers and tensor_split), the text that chat() renders, the server's endpoints.
FREE = {
    "value": """
        threads_batch threads_http cpu_mask cpu_range cpu_strict prio poll cpu_mask_batch
        cpu_range_batch cpu_strict_batch prio_batch poll_batch batch_size ubatch_size flash_attn
        ctx_checkpoints checkpoint_min_step cache_ram load_mode lazy_mode numa override_tensor
        n_cpu_moe n_cpu_ffn fit fit_target alias tags sse_ping_interval slot_save_path
        chat_template chat_template_file chat_template_kwargs reasoning reasoning_format
        reasoning_effort""",
    "switch": "swa_full check_tensors cpu_moe no_host special offline metrics props",
    "either": """
        warmup perf kv_offload op_offload repack cont_batching cache_idle_slots slots jinja
        skip_chat_parsing prefill_assistant reasoning_preserve""",
}
# They change what is computed: both processes get them.
NUMBERS = {
    "rope_freq_base": float,
    "rope_freq_scale": float,
    "yarn_orig_ctx": int,
    "yarn_ext_factor": float,
    "yarn_attn_factor": float,
    "yarn_beta_slow": float,
    "yarn_beta_fast": float,
}
SCALINGS = {"none": 0, "linear": 1, "yarn": 2}  # llama_rope_scaling_type
CACHE_TYPES = ("f16", "f32")
# Of keys alone: quantized values need fused attention.
KEY_TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
SHARED = (
    *NUMBERS,
    *"rope_scale rope_scaling override_kv cache_type_k cache_type_v lora lora_scaled".split(),
    *"control_vector control_vector_scaled control_vector_layer_range".split(),
)

REFUSED = {
    "the model is load_model's first argument": """
        model model_url docker_repo hf_repo hf_file hf_token""",
    "load_model has an argument of its own for it: {instead}": """
        ctx_size n_gpu_layers parallel tensor_split""",
    "sampling is asked for with each request: an argument of infer, infer_stream or chat": """
        samplers seed sampler_seq ignore_eos temp top_k top_p min_p top_nsigma xtc_probability
        xtc_threshold typical repeat_last_n repeat_penalty presence_penalty frequency_penalty
        dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breaker
        adaptive_target adaptive_decay dynatemp_range dynatemp_exp mirostat mirostat_lr
        mirostat_ent logit_bias grammar grammar_file json_schema json_schema_file
        backend_sampling predict reverse_prompt reasoning_budget reasoning_budget_message""",
    "each request has a cache of its own of ctx_size tokens, in captures as in the server": """
        kv_unified kv_unified_per_slot""",
    "the server would answer from a text that it has cut or moved, which no capture shows": """
        context_shift keep cache_reuse""",
    "adapters are applied from the start, in the server as in captures": "lora_init_without_apply",
    "captures read texts, no pictures, sound or video": """
        mmproj mmproj_url mmproj_auto mmproj_offload mmproj_device image_min_tokens
        image_max_tokens mtmd_batch_max_tokens video_fps video_timestamp_interval
        video_ffmpeg_dir media_path""",
    "it brings other models, whose guesses no capture shows": """
        lookup_cache_static lookup_cache_dynamic draft draft_min embd_gemma_default
        gpt_oss_20b_default gpt_oss_120b_default vision_gemma_4b_default vision_gemma_12b_default
        models_dir models_preset models_max models_autoload""",
    "tensor_split says which GPUs the server and captures use, and gpu_layers=0 that they use none": """
        device main_gpu split_mode rpc list_devices""",
    "embed() asks for it": "embd_normalize rerank",
    "this package reads the server's log and answers, and nobody else does": """
        log_disable log_file log_jsonl log_colors log_verbosity log_verbose log_prefix
        log_timestamps log_prompts_dir api_key api_key_file api_prefix ssl_key_file ssl_cert_file
        path reuse_port cors_origins cors_methods cors_headers cors_credentials ui ui_config
        ui_config_file ui_mcp_proxy tools tools_runtime mcp_servers_config mcp_servers_json agent
        sleep_idle_seconds""",
    "nothing in this package would use it": """
        help version cache_list completion_bash escape defrag_thold spm_infill cache_prompt
        slot_prompt_similarity fit_ctx prompt file binary_file""",
    'this llama.cpp calls it load_mode: load_mode="none", "mlock" or "dio"': "mmap mlock direct_io",
}
INSTEAD = {
    "ctx_size": "ctx_size",
    "n_gpu_layers": "gpu_layers",
    "parallel": "n_parallel",
    "tensor_split": "tensor_split",
}
# Other names that llama-server has for an option: option=alias,alias
_ALIASES = """
    threads=t threads_batch=tb cpu_mask=C cpu_range=Cr cpu_mask_batch=Cb cpu_range_batch=Crb
    batch_size=b,n_batch ubatch_size=ub,n_ubatch flash_attn=fa
    ctx_checkpoints=ctxcp,swa_checkpoints checkpoint_min_step=cms cache_ram=cram load_mode=lm
    lazy_mode=lzm override_tensor=ot n_cpu_moe=ncmoe n_cpu_ffn=ncffn cpu_moe=cmoe fit_target=fitt
    fit_ctx=fitc alias=a timeout=to reasoning=rea special=sp kv_offload=kvo no_kv_offload=nkvo
    no_repack=nr cont_batching=cb no_cont_batching=nocb cache_type_k=ctk,type_k
    cache_type_v=ctv,type_v model=m model_url=mu docker_repo=dr hf_repo=hf,hfr hf_file=hff
    hf_token=hft ctx_size=c,n_ctx n_gpu_layers=ngl,gpu_layers parallel=np tensor_split=ts
    split_mode=sm main_gpu=mg device=dev embeddings=embedding rerank=reranking
    predict=n,n_predict temp=temperature seed=s typical=typical_p sampler_seq=sampling_seq
    logit_bias=l top_nsigma=top_n_sigma json_schema=j json_schema_file=jf backend_sampling=bs
    reverse_prompt=r kv_unified=kvu no_kv_unified=no_kvu mmproj=mm mmproj_url=mmu
    mmproj_device=mmdev lookup_cache_static=lcs lookup_cache_dynamic=lcd ui=webui
    ui_config=webui_config ui_config_file=webui_config_file ui_mcp_proxy=webui_mcp_proxy agent=ag
    no_agent=no_ag log_verbosity=lv,verbosity log_verbose=v,verbose slot_prompt_similarity=sps
    defrag_thold=dt help=h,usage cache_list=cl escape=e draft=draft_n,draft_max
    draft_min=draft_n_min prompt=p file=f binary_file=bf rope_freq_base=rope_base
    control_vector=control_vectors
"""
ALIASES = {
    alias: name
    for name, _, aliases in (option.partition("=") for option in _ALIASES.split())
    for alias in aliases.split(",")
}

KIND = {name: kind for kind, names in FREE.items() for name in names.split()}
_WHY_NOT = {name: reason for reason, names in REFUSED.items() for name in names.split()}
_DRAFTS = "md td tbd Cd Crd Cbd ctkd ctvd otd cmoed ncmoed devd ngld hfd hfrd".split()
_OTHER_MODELS = next(reason for reason in REFUSED if reason.startswith("it brings other models"))


def flags(options):
    """Keyword arguments -> llama-server's flags: {"batch_size": 256, "jinja": True, "mmap": False,
    "lora": None} -> ["--batch-size", "256", "--jinja", "--no-mmap"]."""
    made = []
    for name, value in options.items():
        flag = name.strip("-").replace("_", "-")
        if value is True:
            made.append(f"--{flag}")
        elif value is False:
            made.append(f"--no-{flag}")
        elif name == "control_vector_layer_range":
            made += [f"--{flag}", *map(str, value)]
        elif value is not None:
            value = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            made += [f"--{flag}", str(value)]
    return made


def canonical(name, value=True):
    """llama-server's longest name of an option, however it is written, and its value: ("no_jinja",
    True) -> ("jinja", False)."""
    name = name.strip("-").replace("-", "_")
    name = ALIASES.get(name, name)
    positive = name.removeprefix("no_")
    if name != positive and name not in KIND and isinstance(value, bool):
        positive = ALIASES.get(positive, positive)
        if KIND.get(positive) == "either" or positive in _WHY_NOT:
            return positive, not value
    return name, value


def refusal(given, name):
    """Why load_model does not take an option, or what its name may be; name: its `canonical`
    one."""
    if re.match("(no_)?spec_|fim_|draft_p_", name) or name.endswith("_draft") or name in _DRAFTS:
        reason = _OTHER_MODELS
    else:
        reason = _WHY_NOT.get(name)
    if reason:
        return f"load_model does not take {given!r}: {reason.format(instead=INSTEAD.get(name))}."
    near = difflib.get_close_matches(name, [*PARAMETERS, *SHARED, *KIND, *INSTEAD.values()], 1)
    mend = f"; the nearest name is {near[0]!r}" if near else ""
    return f"{given!r} is no option of load_model{mend}. It takes llama-server's own names (batch_size=256)."


def check_pooling(value):
    """The name of a pooling that gives one row per text; OptionError for the others, and for what
    is none."""
    if value == "none":
        raise OptionError(
            'pooling="none" is a row per token, not per text: capture(text, stages="final_norm") has it.'
        )
    if value == "rank":
        raise OptionError(
            'pooling="rank" is a score of a question and a text by a reranker, not an embedding.'
        )
    if value not in ("mean", "cls", "last"):
        raise OptionError(f'pooling={value!r}: it is "mean", "cls" (the first token) or "last".')
    return value


def environment(system_settings=SYSTEM_SETTINGS):
    """The environment of llama.cpp's programs: this process's, without settings that they would
    take from elsewhere and that captures would not have: LLAMA_ARG_* and the user's config.ini.

    Raises ServerError for the machine's config.ini, which nothing keeps from them, if it has any
    but FREE options."""
    try:
        text = Path(system_settings).read_text(errors="replace")
    except OSError:
        text = ""  # there is none: the rule
    others = [
        name
        for name in re.findall(r"^\s*([\w-]+)\s*=", text, re.M)
        if canonical(name)[0] not in (*KIND, "version")
    ]
    if others:
        raise ServerError(
            f"{system_settings} gives llama.cpp's programs settings that captures would not have: "
            f"{', '.join(others)}. Remove them there, and name what a model should have in load_model."
        )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    return logs.ENVIRONMENT | kept | {"XDG_CONFIG_HOME": os.devnull}


def pooling_of(gguf):
    """How embed() pools a GGUFFile's states unless told otherwise: as the file says, by the mean
    where it says nothing.

    Raises OptionError for a reranker's file and for a pooling that llama.cpp does not know.
    """
    said = gguf.metadata.get(f"{gguf.architecture}.pooling_type", 0)
    name = {0: "mean", 1: "mean", 2: "cls", 3: "last"}.get(said)
    if name is None:
        what = (
            "a reranker: it scores a question and a text"
            if said == 4
            else f"of an unknown pooling ({said})"
        )
        raise OptionError(
            f'{gguf.name} is {what}. embed(texts, pooling="mean") pools its states all the same.'
        )
    return name

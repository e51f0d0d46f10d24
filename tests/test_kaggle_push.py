"""The push against a Kaggle of our own: the real client asks it, and it does what Kaggle was seen
to do."""

import importlib
import json
import re
import shutil

import kaggle_standin
import pytest
import requests
from test_kaggle import CHECKOUT, NOTEBOOKS, wheel, wheels_without_pip

from llamatelemetry import cli
from llamatelemetry.errors import StageError
from llamatelemetry.kaggle import push, sessions, stage

pytest.importorskip("kagglesdk", reason="the kaggle client is not installed")
NAMES = [path.stem for path in NOTEBOOKS]
GONE = requests.exceptions.ConnectionError(
    "('Connection aborted.', RemoteDisconnected('closed without response'))"
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The suite staged for `someone`, once: no test changes this folder."""
    out = tmp_path_factory.mktemp("suite") / "staged"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stage, "_pip", wheels_without_pip)
        stage.stage("someone", out, CHECKOUT, progress=False)
    return out


@pytest.fixture
def staged(suite, tmp_path):
    """A copy of the staged suite."""
    return shutil.copytree(suite, tmp_path / "staged")


@pytest.fixture
def kaggle(staged, tmp_path, monkeypatch):
    """The staged suite, and the stand-in that answers the client."""
    return kaggle_standin.install(monkeypatch, tmp_path / "home")


@pytest.fixture
def send(tmp_path):
    return lambda *names, **options: push.push(tmp_path / "staged", names, **options)


def records(tmp_path):
    return json.loads((tmp_path / "staged" / "push.json").read_text())


# The whole way


def test_stage_and_push_end_to_end(kaggle, tmp_path, capsys):
    assert cli.main(["kaggle", "push", "--folder", str(tmp_path / "staged")]) == 0
    assert kaggle.pushed() == ["llamatelemetry-engine", *NAMES]
    assert {
        name: (data["version"], len(data["files"])) for name, data in kaggle.datasets.items()
    } == {"someone/llamatelemetry-wheels": (1, len(kaggle.uploads))}
    first = kaggle.asked("SaveKernel")[0]
    assert first["machineShape"] == "NvidiaTeslaT4" and first["enableGpu"] and first["isPrivate"]
    assert first["sessionTimeoutSeconds"] == sessions.SESSION_S
    runs = [kaggle.kernels[f"someone/{name}"]["run"] for name in ("llamatelemetry-engine", *NAMES)]
    assert kaggle.datasets["someone/llamatelemetry-wheels"]["ready"] <= runs[0].start
    assert all(run.start > runs[0].end for run in runs[1:])
    assert all(record["step"] == "done" for record in records(tmp_path).values())
    out = capsys.readouterr().out
    assert "wheels: version 1 is ready" in out and f"{NAMES[-1]}: complete" in out


def test_a_second_push_sends_what_changed(kaggle, send, tmp_path, capsys):
    send()
    kaggle.calls.clear()
    send()
    assert not kaggle.asked("CreateDatasetVersion", "CreateDataset", "SaveKernel")
    assert capsys.readouterr().out.count("unchanged") == 2 + len(NAMES)
    code = tmp_path / "staged" / NAMES[0] / f"{NAMES[0]}.ipynb"
    code.write_text(code.read_text().replace("PROMPT", "PROMPT ", 1))
    send()
    assert kaggle.pushed() == [NAMES[0]] and kaggle.kernels[f"someone/{NAMES[0]}"]["version"] == 2
    send(NAMES[1], again=True)
    assert kaggle.pushed() == NAMES[:2]


def test_a_wheel_built_again_is_no_change_and_another_one_is(kaggle, send, tmp_path):
    send("wheels", "engine", NAMES[0])
    path = next((tmp_path / "staged" / "wheels").glob("llamatelemetry-*.whl"))
    path.touch()
    wheel(path)  # other dates in it
    send("wheels")
    assert not kaggle.asked("CreateDatasetVersion")
    wheel(path, requires=["more"])
    send("wheels", NAMES[0])
    assert len(kaggle.asked("CreateDatasetVersion")) == 1
    assert kaggle.pushed()[1:] == [NAMES[0]] * 2  # it attaches the dataset: it runs again


def test_time_and_quota_of_the_engine_are_said_before_it_starts(kaggle, send, capsys):
    send("wheels", "engine")
    said = capsys.readouterr().out
    assert (
        "takes 27 to 30 minutes on 4 cores, which count against the week's GPU quota"
        in said.partition("started")[0]
    )
    send("wheels", "engine")
    assert "27 to 30 minutes" not in capsys.readouterr().out  # it is there


# Datasets


@pytest.mark.parametrize("hidden_s", [0, 29 * 60])
def test_a_new_dataset_may_be_denied_for_half_an_hour(kaggle, send, hidden_s):
    kaggle.hidden_s = hidden_s
    send("wheels")
    assert len(kaggle.asked("CreateDataset")) == 1 and not kaggle.asked("CreateDatasetVersion")
    assert kaggle.clock.now >= 1000 + hidden_s


def test_a_dataset_that_never_becomes_ready_ends_the_push(kaggle, send):
    kaggle.processing_s = 1e9
    with pytest.raises(
        StageError, match=r"wheels: version 1 is not ready after 45 minutes, .*blobs_received"
    ):
        send()
    assert not kaggle.pushed()


def test_a_second_version_is_waited_for_by_its_number(kaggle, send, tmp_path):
    """Kaggle first goes on to say `ready` of the version before."""
    send("wheels")
    (tmp_path / "staged" / "wheels" / "more.txt").write_text("more")
    kaggle.processing_s = 200
    before = kaggle.clock.now
    send("wheels")
    assert (
        kaggle.clock.now >= before + 200
        and records(tmp_path)["someone/llamatelemetry-wheels"]["version"] == 2
    )


def test_a_dataset_that_kaggle_cannot_process(kaggle, send):
    create = kaggle.CreateDataset
    kaggle.CreateDataset = lambda body: [
        create(body),
        kaggle.datasets["someone/llamatelemetry-wheels"].update(fails="FAILED"),
    ][0]
    with pytest.raises(StageError, match="could not process the dataset .failed, version 1"):
        send("wheels")


def test_a_dataset_that_was_hidden_when_asked_gets_a_version(kaggle, send, tmp_path):
    send("wheels")
    (tmp_path / "staged" / "push.json").unlink()
    kaggle.fault("GetDatasetStatus", 403, 404)  # our question, and the client's own
    send("wheels")
    assert (
        len(kaggle.asked("CreateDataset")) == 2 and len(kaggle.asked("CreateDatasetVersion")) == 1
    )


def test_an_upload_that_fails_once(kaggle, send):
    kaggle.fault("upload", 400)
    send("wheels")
    assert len(kaggle.datasets["someone/llamatelemetry-wheels"]["files"]) == 2


def test_an_upload_that_fails_is_an_error_and_nothing_is_made_without_its_file(kaggle, send):
    kaggle.fault("upload", *[400] * 100)
    with pytest.raises(StageError, match=r"(?s)pload.*\.whl.*same command goes on"):
        send("wheels")
    assert all(len(data["files"]) == 2 for data in kaggle.datasets.values())


def test_an_answer_that_is_lost_does_not_make_a_second_dataset(kaggle, send):
    """It was made, and the connection broke before the answer."""
    create = kaggle.CreateDataset

    def lost(body):
        create(body)
        raise requests.exceptions.ReadTimeout("Read timed out.")

    kaggle.CreateDataset, kaggle.hidden_s = lost, 0
    send("wheels")
    assert len(kaggle.asked("CreateDataset")) == 1 and not kaggle.asked("CreateDatasetVersion")


def test_an_answer_that_is_lost_about_a_dataset_that_is_hidden(kaggle, send):
    create = kaggle.CreateDataset

    def lost(body):
        kaggle.CreateDataset = create
        create(body)
        raise GONE

    kaggle.CreateDataset, kaggle.hidden_s = lost, 1500
    send("wheels")
    assert kaggle.datasets["someone/llamatelemetry-wheels"]["version"] <= 2


# Sessions


def test_two_sessions_at_a_time_and_no_refusal(kaggle, send):
    """A refused kernel that is new stays behind, empty, and is not found later: none may be
    refused."""
    answers, save = [], kaggle.SaveKernel
    kaggle.SaveKernel = lambda body: answers.append(save(body)) or answers[-1]
    send()
    assert len(answers) == 1 + len(NAMES) and not any("error" in answer for answer in answers)


def test_sessions_of_others_are_waited_for(kaggle, send):
    send("wheels", "engine")
    runs = [
        kaggle_standin.Run(
            start=0, end=kaggle.clock.now + 4000 + i, status="COMPLETE", failure="", log=""
        )
        for i in range(2)
    ]
    kaggle.kernels |= {
        f"someone/other-{i}": {"version": 1, "run": run, "before": None}
        for i, run in enumerate(runs)
    }
    send(NAMES[0])
    assert kaggle.pushed()[1:] == [NAMES[0]] and not kaggle.ghosts
    assert kaggle.kernels[f"someone/{NAMES[0]}"]["run"].start >= runs[0].end


@pytest.mark.parametrize("refusal", [kaggle_standin.SESSIONS_FULL, kaggle_standin.QUOTA_RESERVED])
def test_a_refusal_for_want_of_a_session_is_waited_out(kaggle, send, refusal):
    send("wheels", "engine", NAMES[0])
    kaggle.refuse = [refusal] * 3
    send(NAMES[0], again=True)
    assert kaggle.kernels[f"someone/{NAMES[0]}"]["version"] == 2 and len(kaggle.pushed()) == 2 + 4


@pytest.mark.parametrize(
    "refusal, message",
    [
        (
            kaggle_standin.QUOTA_SPENT,
            "Maximum weekly GPU quota of 30.00 hours reached. Kaggle .Settings, Quotas. and "
            "`kaggle quota` say when",
        ),
        ("You are not allowed to do this.", "Kaggle refuses it: You are not allowed to do this."),
    ],
)
def test_a_refusal_that_waiting_does_not_mend(kaggle, send, refusal, message):
    kaggle.refuse = [refusal]
    with pytest.raises(StageError, match=f"^engine: {message}"):
        send()
    assert kaggle.pushed() == ["llamatelemetry-engine"]


def test_an_empty_notebook_left_behind_is_named(kaggle, send):
    send("wheels")
    kaggle.ghosts.add(f"someone/{NAMES[0]}")
    with pytest.raises(
        StageError, match=f"(?s){NAMES[0]}: Notebook not found.*Delete it on .*{NAMES[0]} "
    ):
        send("engine", *NAMES[:3])
    assert set(kaggle.kernels) == {
        "someone/llamatelemetry-engine",
        *(f"someone/{name}" for name in NAMES[1:3]),
    }
    kaggle.ghosts.clear()  # deleted by hand
    send()
    assert len(kaggle.kernels) == 1 + len(NAMES) and all(
        kernel["version"] == 1 for kernel in kaggle.kernels.values()
    )


def test_a_refusal_that_never_ends_is_a_bounded_wait(kaggle, send):
    send("wheels", "engine")
    kaggle.refuse = [kaggle_standin.QUOTA_RESERVED] * 10_000
    with pytest.raises(
        StageError, match="No session started or ended for 3.5 hours. Session cannot start because"
    ):
        send("engine", again=True, poll_s=300)


def test_quota_that_is_spent_or_reserved_is_asked_for_first(kaggle, send):
    """A new kernel that is refused for it would stay behind, empty."""
    if not hasattr(
        importlib.import_module("kaggle.api.kaggle_api_extended").KaggleApi, "quota_view"
    ):
        pytest.skip("this client tells no quota")
    kaggle.quota |= {"timeUsed": "108000s"}
    with pytest.raises(
        StageError, match="The weekly GPU quota of 30 hours is used up. Kaggle .Settings"
    ):
        send()
    kaggle.quota |= {"timeUsed": "80000s", "timeReserved": "40000s"}
    kaggle.clock.events.append(
        (kaggle.clock.now + 2000, lambda: kaggle.quota.update(timeReserved="0s"))
    )
    send("engine")
    assert kaggle.pushed() == ["llamatelemetry-engine"] and not kaggle.ghosts


@pytest.mark.parametrize(
    "lacks, names",
    [
        ("wheels", "someone/llamatelemetry-wheels"),
        ("engine", "someone/llamatelemetry-engine"),
    ],
)
def test_a_source_that_kaggle_leaves_out_is_an_error_by_name(kaggle, send, lacks, names):
    send("wheels", "engine")
    (kaggle.datasets if lacks == "wheels" else kaggle.kernels).clear()
    with pytest.raises(
        StageError,
        match=f"{NAMES[0]}: Kaggle started version 1 without {names}: not a valid source",
    ):
        send(NAMES[0])


def test_status_calls_that_fail_now_and_then(kaggle, send):
    kaggle.fault(
        "GetKernelSessionStatus",
        500,
        GONE,
        502,
        403,
        0,
        requests.exceptions.ReadTimeout("Read timed out."),
        429,
        503,
        404,
    )
    kaggle.fault("GetDatasetStatus", 0, 0, 500, GONE)
    kaggle.fault("ListKernels", 500)
    send()
    assert len(kaggle.pushed()) == 1 + len(NAMES)


def test_an_answer_that_is_lost_does_not_start_a_second_session(kaggle, send):
    save = kaggle.SaveKernel

    def lost(body):
        save(body)
        kaggle.SaveKernel = save
        raise GONE

    kaggle.SaveKernel = lost
    send("wheels", "engine")
    assert kaggle.pushed() == ["llamatelemetry-engine"]


def test_kaggle_out_of_reach_is_a_bounded_wait(kaggle, send, tmp_path):
    send("wheels")
    kaggle.fault("GetKernelSessionStatus", *[500] * 1000)
    with pytest.raises(
        StageError, match="engine: no answer about its session for 30 minutes: .*\nThe same command"
    ):
        send("engine")
    assert records(tmp_path)["someone/llamatelemetry-engine"]["step"] == "sent"


def test_a_session_that_fails_is_shown_with_its_last_lines(kaggle, send, capsys):
    log = (
        "\n".join(f"line {number}" for number in range(40)) + "\n\x1b[31mnvcc: no such file\x1b[0m"
    )
    kaggle.ends["llamatelemetry-engine"] = (
        "ERROR",
        "Your notebook was stopped because it used too much memory.",
        log,
    )
    with pytest.raises(StageError) as raised:
        send()
    said = str(raised.value)
    assert "engine: the session ended with ERROR (Your notebook was stopped" in said
    assert "code/someone/llamatelemetry-engine has its log" in said
    assert (
        said.count("line ") == 14
        and "\nnvcc: no such file\n" in said
        and "verified phone" not in said
    )
    assert kaggle.pushed() == ["llamatelemetry-engine"]
    kaggle.ends.clear()
    send()  # it is sent again
    assert kaggle.pushed()[:2] == ["llamatelemetry-engine"] * 2 and len(kaggle.pushed()) == 2 + len(
        NAMES
    )


def test_one_notebook_that_fails_leaves_the_others_running(kaggle, send):
    kaggle.ends[NAMES[0]] = ("CANCEL_ACKNOWLEDGED", "", "")
    with pytest.raises(StageError, match=f"{NAMES[0]}: the session ended with CANCEL_ACKNOWLEDGED"):
        send()
    assert kaggle.pushed()[1:] == NAMES


@pytest.mark.parametrize(
    "line",
    [
        "socket.gaierror: [Errno -3] Temporary failure in name resolution",
        "This engine is built for GPUs, and this session has none: choose GPU T4 x2 (Settings, Accelerator)",
        "ERROR: No matching distribution found for wheel>=0.40",
    ],
)
def test_an_account_without_a_verified_phone_is_recognized(kaggle, send, line):
    kaggle.ends["llamatelemetry-engine"] = ("ERROR", "", line)
    with pytest.raises(
        StageError,
        match="only to accounts with a verified phone number.*Settings, Phone verification",
    ):
        send()


def test_an_engine_that_was_built_without_the_gpu_says_why(kaggle, send, capsys):
    kaggle.ends["llamatelemetry-engine"] = (
        "COMPLETE",
        "",
        "This session has no GPU: it costs no GPU quota.\n",
    )
    send("wheels", "engine")
    assert (
        "engine: complete\nIt had no GPU or no internet. Kaggle gives both only"
        in capsys.readouterr().out
    )


def test_what_decides_what_an_engine_holds_is_there():
    assert all((CHECKOUT / name).is_file() for name in push.BUILDERS)


def test_the_sentences_of_our_own_that_tell_of_no_gpu_are_recognized():
    for name in ("kaggle/engine/build_engine.py", "llamatelemetry/kaggle/engine.py"):
        assert sessions.NO_GPU.search((CHECKOUT / name).read_text()), name


def test_a_notebook_without_internet_by_design_is_no_question_of_the_account(kaggle, send):
    kaggle.ends[NAMES[0]] = ("ERROR", "", "Temporary failure in name resolution")
    with pytest.raises(StageError) as raised:
        send()
    assert "verified phone" not in str(raised.value) and "name resolution" in str(raised.value)


# Stopping and going on


@pytest.mark.parametrize("after", range(0, 1400, 125))
def test_a_push_that_was_stopped_goes_on(kaggle, send, tmp_path, capsys, after):
    def stop():
        raise KeyboardInterrupt

    kaggle.clock.events.append((kaggle.clock.now + after + 1, stop))
    with pytest.raises(KeyboardInterrupt):
        send()
    assert "The same command goes on" in capsys.readouterr().err
    send()
    assert kaggle.pushed() == ["llamatelemetry-engine", *NAMES]
    assert len(kaggle.asked("CreateDataset")) == 1 and not kaggle.asked("CreateDatasetVersion")
    assert all(kernel["version"] == 1 for kernel in kaggle.kernels.values())


def test_no_wait_sends_what_it_can_and_the_next_goes_on(kaggle, send, capsys):
    send(wait=False)
    assert kaggle.pushed() == ["llamatelemetry-engine"]
    kaggle.clock.sleep(400)
    send(wait=False)
    assert kaggle.pushed() == ["llamatelemetry-engine"] + NAMES[:2]
    assert "Not waited for: 2 running, 3 waiting" in capsys.readouterr().out


# Before anything is sent


def test_nothing_is_sent_where_one_folder_breaks_a_rule(kaggle, send, tmp_path):
    path = tmp_path / "staged" / NAMES[-1] / "kernel-metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"title": "Another"}))
    with pytest.raises(StageError, match="Kaggle makes"):
        send()
    assert not kaggle.calls


def test_a_token_of_another_account(kaggle, send, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "Another")
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    with pytest.raises(
        StageError, match="staged for someone, and the token is Another's: .*--user another"
    ):
        send()
    assert not kaggle.uploads


@pytest.mark.parametrize(
    "key, content, message",
    [
        (None, None, "no token that is valid. Kaggle: Settings, API, Generate New Token"),
        ("access_token", "expired", r"(?s)no token that is valid"),
        ("kaggle.json", '{"username": "someone"}', r"(?s)Generate New Token"),
    ],
)
def test_a_token_that_is_missing_or_refused_is_an_error_and_no_exit(
    staged,
    tmp_path,
    monkeypatch,
    send,
    key,
    content,
    message,
):
    kaggle_standin.install(monkeypatch, tmp_path / "home", key=key)
    if content:
        (tmp_path / "home" / ".kaggle" / key).write_text(content)
    with pytest.raises(StageError, match=message):
        send()


def test_the_new_kind_of_token(staged, tmp_path, monkeypatch, send):
    standin = kaggle_standin.install(monkeypatch, tmp_path / "home", key="access_token")
    send("wheels")
    assert standin.datasets


def test_a_token_that_kaggle_refuses(kaggle, send):
    kaggle.fault("GetDatasetStatus", 401)
    with pytest.raises(StageError, match="Kaggle refuses the token .*Generate New Token"):
        send()


def test_warnings_of_the_client_are_no_failure(kaggle, send, capsys):
    """A world-readable kaggle.json (the stand-in's is one) and an outdated client: both are printed
    among answers."""
    send("wheels")
    out = capsys.readouterr().out
    assert "outdated `kaggle`" in out and re.search(r"Upload successful: gguf-1\.0", out)
    assert "version 1 is ready" in out


def test_no_client(kaggle, send, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kaggle", None)
    with pytest.raises(StageError, match="pip install 'kaggle>=1.8.4' six"):
        send()


def test_push_of_what_is_not_staged(tmp_path, capsys):
    assert cli.main(["kaggle", "push", "--folder", str(tmp_path / "none")]) == 1
    assert "kaggle stage --user NAME" in capsys.readouterr().err


def test_an_unreadable_state(kaggle, send, tmp_path):
    (tmp_path / "staged" / "push.json").write_text("{")
    with pytest.raises(StageError, match="push.json is no JSON: delete it"):
        send()

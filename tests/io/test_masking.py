"""Masking: no secret is written or sent, wherever the user put it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_runner.io.masking import holds_secret, mask_override, mask_secrets, mask_text
from tests.support.programs import run_python
from tests.support.wandb_server import WandbServer


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pass@example.com/x", "https://***@example.com/x"),
        ("postgresql://me:pass@/a?host=/tmp&sslpassword=abc", "postgresql://***@/a?host=/tmp&sslpassword=***"),
        ("https://:pass@example.com", "https://***@example.com"),
        ("https://me:p@ss@example.com", "https://***@example.com"),
        ("https://abcdefghijklmnop0123@example.com/a.git", "https://***@example.com/a.git"),
        ("ssh://git@example.com/a.git", "ssh://git@example.com/a.git"),
        ("https://example.com/x?api_key=abc&beta=1", "https://example.com/x?api_key=***&beta=1"),
        ("s3://b/k?X-Amz-Signature=abc123&X-Amz-Date=1", "s3://b/k?X-Amz-Signature=***&X-Amz-Date=1"),
        ("Authorization: Bearer abcdefgh12", "Authorization: Bearer ***"),
        ("password = hunter2, then", "password = ***, then"),
        ("{db_password: hunter2, r: 8}", "{db_password: ***, r: 8}"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def_1", "***"),
        ("github_pat_" + "a1" * 12, "***"),
        ("judge.api_key_env=OPENAI_API_KEY", "judge.api_key_env=OPENAI_API_KEY"),
        ("pad_token=<|pad|>, eos_token: </s>", "pad_token=<|pad|>, eos_token: </s>"),
        ("1.5 tokens: 12, token in the text", "1.5 tokens: 12, token in the text"),
        ("see http://host:80/a and me@example.com", "see http://host:80/a and me@example.com"),
    ],
)
def test_a_text_is_masked_where_it_holds_a_secret(text: str, masked: str) -> None:
    assert mask_text(text) == masked
    assert holds_secret(text) == (text != masked)
    assert mask_text(masked) == masked


def test_what_hydra_shows_is_masked() -> None:
    note = "wandb.notes='login https://me:abcdefg@host/a'"
    result = run_python("-m", "dpo_runner", "--cfg", "all", note, f"model.revision={'0' * 40}")
    assert result.returncode == 0 and "abcdefg" not in result.stdout and "https://***@host/a" in result.stdout
    assert f"  revision: '{'0' * 40}'\n" in result.stdout and "adapter_revision: null\n" in result.stdout


def test_tokens_of_a_tokenizer_are_no_secrets() -> None:
    config = {"model": {"pad_token": "<pad>", "hub_token": "abc"}, "eos_token": "</s>"}
    assert mask_secrets(config) == {"model": {"pad_token": "<pad>", "hub_token": "***"}, "eos_token": "</s>"}
    assert mask_override("model.pad_token=x") == "model.pad_token=x"
    assert mask_override("++lora.config={api_key:abc,r:8}") == "++lora.config={api_key:***,r:8}"


@pytest.mark.parametrize(
    ("name", "value", "text", "masked"),
    [
        ("MY_TOKEN", "plain words", "say plain words", "say ***"),
        ("PGPASSWORD", "hunter22", "hunter22!", "***!"),
        ("DEPLOY_KEY", "a.b+c(", "x a.b+c( y", "x *** y"),
        ("https_proxy", "http://me:hunter22@proxy:8080", "login hunter22", "login ***"),
        ("PWD", "/home/me/runs", "/home/me/runs/1", "/home/me/runs/1"),
        ("MY_TOKEN", "abc", "abc", "abc"),
        ("MY_TOKEN_FILE", "somewhere", "somewhere", "somewhere"),
        ("SERVICE_KEY", "/etc/passwd", "/etc/passwd", "/etc/passwd"),
        ("SERVICE_KEY", "/etc/no-such-key.pem", "at /etc/no-such-key.pem", "at ***"),
        ("AWS_SECRET_ACCESS_KEY", "/bPxRfiCYEXAMPLEKEY+k7", "sent /bPxRfiCYEXAMPLEKEY+k7", "sent ***"),
        ("MY_TOKEN", "~opaque", "~opaque!", "***!"),
        ("SERVICE_TOKEN", " opaque value\t\n", "an opaque value.", "an ***."),
        ("DB_PASSWORD", "83749201", "as 83749201", "as ***"),
        ("DB_PASSWORD", "8374920", "8374920 tokens", "8374920 tokens"),
        ("MAX_TOKEN", "1000000", "1000000 rows", "1000000 rows"),
    ],
)
def test_what_the_environment_calls_a_secret_is_one(name, value, text, masked, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    assert mask_text(text) == masked


HF, KEY, PASSWORD = "hf_" + "Zq9W" * 8, "c0ffee1234" * 4, "tr0ub4dor-and-3"
SECRETS = (HF, KEY, PASSWORD, "opaque-value-of-a-variable", "of-the-remote-55", "of-a-proxy-66")
CANARY = "canary-of-the-search"


def search(*folders: Path) -> tuple[list[str], bool]:
    """Return each path in `folders` with a secret in its name or content, and whether any has the canary."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    texts = {path: str(path).encode() + (path.read_bytes() if path.is_file() else b"") for path in paths}
    found = [f"{path}: {secret}" for path, text in texts.items() for secret in SECRETS if secret.encode() in text]
    return found, any(CANARY.encode() in text for text in texts.values())


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment variables with secrets, in a git checkout whose remote URL has one."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    remote = "https://me:of-the-remote-55@example.com/x.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"})
    return {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "DPO_RUNNER_CACHE": os.environ["DPO_RUNNER_CACHE"],
        "HF_TOKEN": HF,
        "WANDB_API_KEY": KEY,
        "DB_PASSWORD": PASSWORD,
        "SERVICE_TOKEN": "opaque-value-of-a-variable",
        "HTTPS_PROXY": "http://me:of-a-proxy-66@127.0.0.1:9",
    }


OVERRIDES = [
    f"wandb.notes='{CANARY} {HF} https://me:{PASSWORD}@example.com ${{oc.env:SERVICE_TOKEN}}'",
    "wandb.group=${oc.env:SERVICE_TOKEN}",
    f"wandb.job_type={KEY}",
    f"wandb.name={HF}",
    f"wandb.tags=[{CANARY},{KEY}]",
]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.stop()


def test_no_secret_is_written_or_sent(planted, server, tiny_run: list[str], tmp_path: Path) -> None:
    environment = {**planted, "WANDB_BASE_URL": server.url}
    overrides = [*tiny_run, "training.max_steps=1", "wandb=online", *OVERRIDES, "run_dir=r"]
    result = run_python("-m", "dpo_runner", *overrides, env=environment)
    assert result.returncode == 0, result.stderr
    found, searched = search(Path("r"), Path(os.environ["DPO_RUNNER_CACHE"]), tmp_path / "home")
    assert found == [] and searched
    sent = b"".join(server.received)
    assert CANARY.encode() in sent and not [secret for secret in SECRETS if secret.encode() in sent]
    assert not [secret for secret in SECRETS if secret in result.stdout + result.stderr]
    page = run_python("-m", "dpo_runner.compare", "r", "--html", "page.html", "--json", "page.json", env=environment)
    assert page.returncode == 0, page.stderr
    text = Path("page.html").read_text() + Path("page.json").read_text() + page.stdout
    assert not [secret for secret in SECRETS if secret in text]


def test_no_secret_is_in_what_a_sweep_and_its_failures_leave(planted, tiny_run: list[str], pairs: str) -> None:
    lost = f"https://me:{PASSWORD}@example.com/x.jsonl"
    overrides = ["training.max_steps=1", "wandb=offline", *OVERRIDES, f"data.path={pairs},'{lost}'", "sweep.dir=s"]
    result = run_python("-m", "dpo_runner", "-m", *tiny_run, *overrides, env=planted)
    assert "1 of 2 runs of the sweep failed" in result.stderr and "Traceback" not in result.stderr, result.stderr
    found, searched = search(Path("s"))
    assert found == [] and searched
    assert not [secret for secret in SECRETS if secret in result.stdout + result.stderr]


def test_a_traceback_in_run_log_holds_none(planted, tiny_run: list[str]) -> None:
    code = (
        "import sys, dpo_runner.train, dpo_runner.__main__ as program\n"
        f"def fail(*args): raise ValueError('no access to https://me:{PASSWORD}@example.com with {HF}')\n"
        "sys.modules['dpo_runner.train'].load_policy = fail\n"
        f"sys.argv = {['dpo_runner', *tiny_run, 'run_dir=r', f'wandb.tags=[{CANARY}]']!r}\n"
        "program.main()\n"
    )
    result = run_python("-c", code, env=planted)
    assert result.returncode == 1 and "no access to https://***@example.com with ***" in result.stderr, result.stderr
    assert "no access to https://***@example.com" in Path("r/run.log").read_text()
    found, searched = search(Path("r"))
    assert found == [] and searched and PASSWORD not in result.stderr and HF not in result.stderr

"""Transfers that are cut off, and what tokens leave behind: no artifact loads wrongly, and no token is written down."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hub_server import Fault, HubServer

pytestmark = pytest.mark.slow  # the client waits before it tries again
RunClient = Callable[..., subprocess.CompletedProcess[str]]
NAME = "revelio/interrupted"

COMMON = f"""
    import json, logging, os, sys, urllib.request
    import torch
    from diffusion_sae import FeatureStore, KSparseAutoencoder, KSparseAutoencoderConfig
    NAME, seen = {NAME!r}, {{}}

    def faults(*some):
        request = urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", json.dumps(some).encode())
        urllib.request.urlopen(request).read()

    def fault(how, path, method="GET", times=1):
        faults({{"how": how, "path": path, "method": method, "times": times}})

    def made(seed):
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=64, num_latents=512, k=4, init_seed=seed))
        sae.metrics = {{"fvu": 0.5}}
        return sae

    def version(load):
        "Which of the two SAEs it is; the error, if it is none."
        try:
            sae = load()
        except (OSError, ValueError) as error:
            return type(error).__name__
        of = {{seed: made(seed).state_dict() for seed in (1, 2)}}
        state = sae.state_dict()
        same = [seed for seed in of if all(torch.equal(of[seed][name], state[name]) for name in state)]
        assert len(same) == 1, "neither the one nor the other"
        return same[0]
"""

DOWNLOAD = (
    COMMON
    + """
    made(1).push_to_hub(NAME)
    for how, times in (("500", 1), ("reset", 1), ("cut", 1), ("drip", 1), ("cut", 100), ("reset", 100)):
        for path in ("model.safetensors", "config.json", "metrics.json"):
            cache = os.path.join(sys.argv[1], f"{how}-{times}-{path}")
            fault(how, "resolve/.*" + path, times=times)
            load = lambda **more: KSparseAutoencoder.from_pretrained(NAME, cache_dir=cache, **more)
            first = version(load)
            faults()
            seen[f"{how} {times} {path}"] = [first, version(lambda: load(local_files_only=True)), version(load)]
    print(json.dumps(seen))
"""
)
UPLOAD = (
    COMMON
    + """
    made(1).push_to_hub(NAME)
    load = lambda: KSparseAutoencoder.from_pretrained(NAME, force_download=True)
    for how, path, method, times in (
        ("reset", "/lfs/[0-9a-f]{64}", "PUT", 100),
        ("reset", "/commit/", "POST", 100),
        ("reset", "/preupload/", "POST", 100),
        ("500", "/lfs/[0-9a-f]{64}", "PUT", 1),
    ):
        sae = made(2)
        fault(how, path, method, times)
        try:
            sae.push_to_hub(NAME)
            pushed = "pushed"
        except OSError as error:
            pushed = type(error).__name__
        except Exception as error:  # of the connection, by the client's library
            pushed = f"{type(error).__module__.partition('.')[0]} {type(error).__name__}"
        faults()
        there = version(load)
        sae.push_to_hub(NAME)
        seen[f"{how} {times} {path}"] = [pushed, there, version(load)]
        made(1).push_to_hub(NAME)
    print(json.dumps(seen))
"""
)


def test_downloads_that_are_cut_off(run_client: RunClient, tmp_path: Path, hub: HubServer) -> None:
    """After each: what loads offline from what was left, and what loads when the Hub is well again."""
    seen = json.loads(run_client(DOWNLOAD, hub.token, args=(tmp_path,)).stdout)
    assert len(seen) == 18
    for name, (first, offline, again) in seen.items():
        assert again == 1, name
        assert first == 1 or isinstance(first, str), name
        assert offline == 1 or isinstance(offline, str), name
        if first == 1:
            assert offline == 1, name
    assert seen["drip 1 model.safetensors"][0] == 1, "slow is not broken"
    assert isinstance(seen["cut 100 model.safetensors"][0], str), "in the end it gives up"


def test_uploads_that_are_cut_off(run_client: RunClient, hub: HubServer) -> None:
    """The repository holds the old artifact or the new one, whole; pushing again ends it."""
    seen = json.loads(run_client(UPLOAD, hub.token).stdout)
    for name, (pushed, there, again) in seen.items():
        assert again == 2, name
        assert there == (2 if pushed == "pushed" else 1), name
    assert seen["reset 100 /commit/"][0] != "pushed"
    assert seen["500 1 /lfs/[0-9a-f]{64}"][0] == "pushed", "one failure is tried again"


def test_a_client_that_is_killed_while_it_uploads(run_client: RunClient, tmp_path: Path, hub: HubServer) -> None:
    run_client(COMMON + "\n    made(1).push_to_hub(NAME)\n", hub.token)
    commits = len(hub.commits(NAME))
    hub.faults = [Fault("hang", "/lfs/[0-9a-f]{64}", "PUT", 100)]
    env = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    env |= {"HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    code = "\n".join(line[4:] for line in (COMMON + "\n    made(3).push_to_hub(NAME)\n").splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while hub.faults[0].times == 100 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert hub.faults[0].times < 100, "it did not come to the upload"
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.faults = []
    assert len(hub.commits(NAME)) == commits
    after = COMMON + "\n    print(version(lambda: KSparseAutoencoder.from_pretrained(NAME)))\n"
    assert run_client(after, hub.token).stdout.strip() == "1"


TOKENS = (
    COMMON
    + """
    logging.basicConfig(level=logging.DEBUG)
    token, wrong, work = sys.argv[1:]
    sae = made(1)
    sae.push_to_hub(NAME + "-private", private=True, token=token)
    loaded = KSparseAutoencoder.from_pretrained(NAME + "-private", token=token, cache_dir=work + "/cache")
    loaded.save_pretrained(work + "/saved")
    loaded.push_to_hub(NAME + "-private", token=token)
    print(loaded, loaded.config, loaded.card_text(NAME))
    for given in (token, wrong):
        for call in (
            lambda: KSparseAutoencoder.from_pretrained("revelio/missing", token=given),
            lambda: KSparseAutoencoder.from_foreign("revelio/missing", token=given),
            lambda: KSparseAutoencoder.from_pretrained(NAME + "-private", token=given, revision="no-such-branch"),
            lambda: FeatureStore.from_hub("revelio/missing", token=given),
            lambda: sae.push_to_hub("someone-else/sae", token=given),
        ):
            try:
                call()
            except Exception as error:
                logging.exception("failed")
                seen[str(len(seen))] = [str(error), repr(error)]
    fault("reset", "resolve/.*model.safetensors", times=100)
    cut_off = dict(token=token, cache_dir=work + "/other")
    print(version(lambda: KSparseAutoencoder.from_pretrained(NAME + "-private", **cut_off)))
    faults()
    assert len(seen) == 10
    print(json.dumps(seen))
"""
)


def test_tokens_are_not_written_down(run_client: RunClient, tmp_path: Path, hub: HubServer) -> None:
    """Not in logs at their most talkative, errors, cards, or any file."""
    token, wrong = "hf_SecretOfTheOwner0123456789abcdef", "hf_WrongSecret0123456789abcdefghij"
    hub.add_token(token, "owner", ("revelio",))
    done = run_client(TOKENS, None, args=(token, wrong, tmp_path), cache=tmp_path / "home")
    assert "DEBUG" in done.stderr
    for secret in (token, wrong):
        assert secret not in done.stdout
        assert secret not in done.stderr
        for path in tmp_path.rglob("*"):
            if path.is_file():
                assert secret.encode() not in path.read_bytes(), path
    for folder in ("saved", "cache"):
        assert any((tmp_path / folder).rglob("README.md")) or folder == "cache"
    assert not any(secret.encode() in path.read_bytes() for secret in (token, wrong) for path in hub.folder.iterdir())


def test_the_command_line_does_not_show_its_token(hub: HubServer, tmp_path: Path) -> None:
    env = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    token = "hf_OnTheCommandLine0123456789abcdef"
    binary = Path(sys.executable).parent / "diffusion-sae"
    for arguments in (
        ("push", "tiny-sd-up1-t50", "someone-else/sae", "--token", token),
        ("convert", "revelio/missing", str(tmp_path / "out"), "--token", token, "--json"),
    ):
        done = subprocess.run([binary, *arguments], env=env, capture_output=True, text=True, check=False, timeout=280)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert token not in done.stdout + done.stderr

"""A session in one file: plain torch.load reads it, misfits are named, and a fresh session goes on to the bit."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

import esper
from esper.leyline.errors import CheckpointError, ConfigError
from esper.session.file import FORMAT, content_digest
from tests.support.sessions import LIFE_STEPS, SITES, A, B, adamw, host, loss, make, probe, replica, train


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return schedules.OneCycleLR(optimizer, max_lr=0.02, total_steps=2 * LIFE_STEPS)


@pytest.fixture
def path(tmp_path):
    session = make()
    train(session, range(11))
    session.save(tmp_path / "s.pt")
    return tmp_path / "s.pt"


def restore(path: Any, build: Any = host, **more: Any) -> esper.Session:
    return esper.Session.restore(path, build, **{"loss": loss, "probe": probe(), **more})


CUTS = [0, 5, 9, 14, 21]


def noisy() -> nn.Module:
    return host(dropout=0.3, batch_norm=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A life that is saved at each cut: the folder of its files, what it comes to, and the numbers drawn after it."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(7)
    session = make(noisy(), scheduler=one_cycle, clip_norm=0.3)
    for cut, after in zip(CUTS, [*CUTS[1:], LIFE_STEPS], strict=True):
        session.save(folder / f"{cut}.pt")
        train(session, range(cut, after))
    return folder, replica(session), torch.rand(4)


@pytest.mark.parametrize("cut", CUTS)
def test_a_restore_goes_on_bit_for_bit_from_any_step(cut, whole):
    folder, wanted, drawn = whole
    torch.manual_seed(99)
    again = restore(folder / f"{cut}.pt", noisy, scheduler=one_cycle)
    assert again.steps == cut
    train(again, range(cut, LIFE_STEPS))
    assert replica(again) == wanted
    assert torch.equal(torch.rand(4), drawn)


def test_planted_seeds_stand_from_the_first_step_and_come_back(tmp_path):
    session = make(slots={"incubation": "shadow", "max_live": None, "embargo_ticks": 1, "planted": {B: "norm"}})
    before = replica(session)["parameters"]
    assert any(name.startswith(f"esper_slots.{B}.seed") for name in before)
    assert session.grown.slots[B].level == 1.0
    train(session, range(5))
    assert not any(replica(session)["parameters"][name] == bits for name, bits in before.items()), "all of it learns"
    session.save(tmp_path / "s.pt")
    again = restore(tmp_path / "s.pt")
    for one in (session, again):
        train(one, range(5, 9))
    assert replica(again) == replica(session)


def test_plain_torch_reads_the_file_and_its_digest_is_that_of_its_content(path):
    payload = torch.load(path, weights_only=True)
    assert payload["kind"] == "esper session"
    host_keys = set(host().state_dict())
    assert host_keys < set(payload["model"])
    assert {name.split(".")[1] for name in set(payload["model"]) - host_keys} <= {"r0c0", "r1c0"}
    assert payload["topology"][A]["module"] == SITES[A]
    digest = payload.pop("sha256")
    assert digest == content_digest(payload)
    payload["model"]["0.bias"][0] += 1e-15
    assert digest != content_digest(payload)


def test_a_file_that_was_there_is_kept_when_the_disk_says_no(path, monkeypatch):
    session, before = make(), path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esper.leyline.files.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"s\.pt: not saved: OSError.*No space left"):
        session.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["s.pt"]
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"not saved: FileNotFoundError"):
        session.save(path.parent / "absent" / "s.pt")
    session.save(path)
    assert path.read_bytes() != before


def test_damage_is_named(path):
    raw = bytearray(path.read_bytes())
    torch.save(torch.zeros(3), path.with_name("other.pt"))
    with pytest.raises(CheckpointError, match=r"other\.pt: not a session's checkpoint"):
        restore(path.with_name("other.pt"))
    with pytest.raises(CheckpointError, match=r"none\.pt: cannot be read \(No such file"):
        restore(path.with_name("none.pt"))
    path.with_name("text.pt").write_text("hello")
    for name, content in (("text.pt", b"hello"), ("s.pt", raw[: len(raw) // 2])):
        path.with_name(name).write_bytes(content)
        with pytest.raises(
            CheckpointError, match=rf"{name}: cannot be loaded \(.*; it is damaged, or no file of session"
        ):
            restore(path.with_name(name))
    with pytest.raises(ConfigError, match="build_host = Linear: expected a function that builds the host"):
        restore(path, nn.Linear(2, 2))
    path.write_bytes(raw)
    payload = torch.load(path, weights_only=True)
    payload["model"]["3.weight"].view(-1)[0] += 1.0
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match=r"s\.pt: SHA-256 differs from the one it was saved with"):
        restore(path)


def edited(path: Any, change: Any) -> Any:
    payload = torch.load(path, weights_only=True)
    del payload["sha256"]
    change(payload)
    torch.save({**payload, "sha256": content_digest(payload)}, path)
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.pop("scheduler"), r"missing \['scheduler'\], unknown nothing"),
        (lambda p: p.update(extra=1), r"missing nothing, unknown \['extra'\]"),
        (lambda p: p.update(format=999), f"format 999, this version reads {FORMAT}"),
        (lambda p: p["run_state"].pop("tick"), "run_state: missing tick"),
        (lambda p: p["settings"].update(stepps=3), "settings: unknown stepps"),
        (lambda p: p["model"].pop("7.bias"), r"Missing key.*7\.bias"),
        (
            lambda p: p["model"].pop("esper_slots.r0c0.seed.depthwise.weight", p["model"].pop(seed_key(p))),
            "Missing key",
        ),
        (lambda p: p["optimizer"]["state"].pop("0.bias"), r"optimizer state: missing \['0\.bias'\]"),
        (lambda p: p["topology"][A].pop("dim"), "r0c0: missing dim"),
        (lambda p: p["ranks"][0].pop("health"), r"ranks\[0\]: missing \['health'\], unknown none"),
    ],
)
def test_a_missing_or_unknown_key_is_named(change, text, path):
    with pytest.raises(CheckpointError, match=text):
        restore(edited(path, change))


def seed_key(payload: Any) -> str:
    return next(name for name in payload["model"] if name.startswith("esper_slots.r0c0"))


def test_another_host_optimizer_or_scheduler_is_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        restore(path, lambda: nn.Sequential(nn.Conv2d(1, 5, 3), *host()[1:]))

    def other(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        return torch.optim.AdamW([{"params": [first]}, {"params": rest}])

    with pytest.raises(CheckpointError, match="its groups hold other parameters than the saved ones"):
        restore(path, optimizer=other)
    with pytest.raises(CheckpointError, match="it has no scheduler and the session has one"):
        restore(path, scheduler=one_cycle)

    class Mine(torch.optim.AdamW):
        pass

    session = make(optimizer=lambda model: Mine(model.parameters(), lr=0.01))
    session.save(tmp_path / "mine.pt")
    with pytest.raises(CheckpointError, match=r"its optimizer is a tests\..*Mine; pass optimizer="):
        restore(tmp_path / "mine.pt")
    assert restore(tmp_path / "mine.pt", optimizer=adamw).steps == 0
    with pytest.raises(CheckpointError, match=r"saved under other settings: seed_lr_scale was 1\.0, is 0\.5"):
        make(seed_lr_scale=0.5).load_state_dict(session.state_dict())

"""Reads wandb's offline file back: what a run really wrote, without wandb's service or a server.

A header of 7 bytes (``:W&B``, magic, version), then LevelDB log blocks of 32,768 bytes counted from the file's
beginning, with chunks ``<IHB`` (CRC-32 of type and data, length, type: 1 full, 2 first, 3 middle, 4 last), each
whole one a protobuf ``Record``. A torn tail, as a kill leaves it, ends the file; damage before it is an error.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32_768
HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbFile:
    """One attempt, read back.

    Fields:
        history: one dict per logged row, in order.
        metrics: explicitly defined ones, name or glob -> step metric ('' for none).
        config, summary: as last written. run: id, project, group, job type, name, tags.
        alerts, artifacts: in order, with the entries of each artifact as (name, reference).
        ended: the file holds wandb's exit record. exit_code: in it.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    alerts: list[dict[str, str]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False
    exit_code: int | None = None


def offline_files(run_dir: Path) -> list[Path]:
    """The offline files under a run directory, oldest first."""
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def _records(data: bytes) -> Iterator[bytes]:
    if data[:4] != b":W&B":
        raise ValueError(f"not a wandb file: begins with {data[:7]!r}")
    at, parts = HEADER, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        if at + 7 > len(data):
            return
        crc, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + 7 : at + 7 + length]
        if len(chunk) < length or (kind == 0 and not any(data[at:])):
            return
        if zlib.crc32(data[at + 6 : at + 7 + length]) != crc:
            raise ValueError(f"wandb file: chunk at byte {at} fails its CRC")
        at += 7 + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts


def _items(items: Any) -> Iterator[tuple[str, Any]]:
    for item in items:
        yield item.key or "/".join(item.nested_key), json.loads(item.value_json)


def read_wandb_file(path: Path) -> WandbFile:
    """Parses one ``.wandb`` file."""
    out = WandbFile()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            out.history.append(dict(_items(record.history.item)))
        elif kind == "metric" and not record.metric.expanded_from_glob:
            out.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "summary":
            out.summary.update(_items(record.summary.update))
        elif kind == "config":
            out.config.update(_items(record.config.update))
        elif kind == "run":
            run = record.run
            out.config.update(_items(run.config.update))
            out.run = {
                "id": run.run_id,
                "entity": run.entity,
                "project": run.project,
                "group": run.run_group,
                "job_type": run.job_type,
                "name": run.display_name,
                "tags": list(run.tags),
            }
        elif kind == "alert":
            out.alerts.append({"title": record.alert.title, "text": record.alert.text, "level": record.alert.level})
        elif kind == "artifact":
            artifact = record.artifact
            entries = [(entry.path, entry.ref) for entry in artifact.manifest.contents]
            about = json.loads(artifact.metadata or "{}")
            named = {"name": artifact.name, "type": artifact.type, "aliases": list(artifact.aliases)}
            out.artifacts.append({**named, "metadata": about, "entries": entries})
        elif kind == "exit":
            out.ended, out.exit_code = True, record.exit.exit_code
    return out

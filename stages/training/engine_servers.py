"""Engines behind servers of vLLM, opened for a stage: its own ones, or those that it is given."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch

from artifacts.errors import StageError
from stages.context import Context
from stages.rollouts.engine import Engine, ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.kept_folder import KeptFolder
from stages.rollouts.vllm_client import ServerEngine, Servers
from stages.rollouts.vllm_given_servers import GivenServers
from stages.rollouts.vllm_nccl_group import vllm_group
from stages.rollouts.vllm_own_servers import OwnServers
from stages.rollouts.vllm_seen_servers import SeenServers
from stages.rollouts.vllm_transfer import NcclTransfer
from stages.rollouts.weight_files import WeightFiles
from stages.training.processes import Processes


def open_servers(
    context: Context, processes: Processes, settings: EngineConfig, model: ServedModel, *, role: str, log_name: str
) -> Engine:
    """Every process asks the same servers; the first one starts them, or sends them weights. What they did is among
    the stage's timings at its end, under their `role`."""
    servers = (
        _given(context, processes, settings, model)
        if settings.urls
        else _own(context, processes, settings, model, log_name)
    )
    engine = ServerEngine(servers, model, settings)
    context.resources.callback(
        lambda: context.timings.update({f"{role}/{name}": value for name, value in engine.figures().items()})
    )
    return engine


def _own(context: Context, processes: Processes, settings: EngineConfig, model: ServedModel, log_name: str) -> Servers:
    if processes.rank == 0:
        transfer = _transfer(context, settings, model)
        many = settings.servers > 1
        context.phase(f"starting {settings.servers} vLLM servers" if many else "starting a vLLM server")
        logs = Path(context.spec.job)
        own = OwnServers(model, settings, logs, context.log, transfer=transfer, log_name=log_name)
        context.resources.callback(own.stop)
        processes.share(str(own.folder))
        return own
    return SeenServers(Path(processes.share("")), settings.servers, adapter=model.adapter_name)


def _given(context: Context, processes: Processes, settings: EngineConfig, model: ServedModel) -> Servers:
    run, files, transfer = processes.share(secrets.token_hex(8)), context.scratch, None
    if processes.rank == 0:
        transfer = _transfer(context, settings, model)
        if transfer is None:
            files = _kept_folder(context, Path(str(settings.weights_folder)))
    return GivenServers(settings, model, WeightFiles(files / "weights", model.adapter), run, context.log, transfer)


def _kept_folder(context: Context, place: Path) -> Path:
    """One of this run, that the servers see."""
    if not place.is_dir():
        raise StageError(f"rollouts.weights_folder {place} is not a folder of this machine")
    kept = KeptFolder(place, "posttrain-weights-")
    kept.path.chmod(0o755)  # the servers may be another user's
    context.resources.callback(kept.remove)
    return kept.path


def _transfer(context: Context, settings: EngineConfig, model: ServedModel) -> NcclTransfer | None:
    """What carries weights in the place of files; closed with the stage."""
    if settings.weight_transfer == "folder":
        return None
    transfer = NcclTransfer(getattr(torch, model.dtype), settings.request_timeout_seconds, vllm_group())
    context.resources.callback(transfer.close)
    return transfer

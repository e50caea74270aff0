"""From settings to a core and an HTTP application: what a service is made of."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from fastapi import FastAPI

from penstock.checkpoint import resolve
from penstock.service.api.app import create_app
from penstock.service.api.config import ApiConfig
from penstock.service.cluster.roles import RoleKeeperConfig
from penstock.service.config import ClusterConfig, ServeConfig
from penstock.service.core import ServiceCore, ServiceCoreConfig
from penstock.service.generation import Generator
from penstock.service.policies.roles import RolesConfig
from penstock.service.recipe import CoreRecipe
from penstock.service.recorder import NO_TAPE, FileTape, Tape, make_core
from penstock.service.text.texts import Texts


def build_core(config: ServeConfig, tape: Tape = NO_TAPE) -> ServiceCore:
    return make_core(recipe_of(config), tape)


def recipe_of(config: ServeConfig) -> CoreRecipe:
    cluster = config.cluster
    return CoreRecipe(
        ServiceCoreConfig(
            name=config.name or f"{socket.gethostname()}-{os.getpid()}",
            # Grows with each start of the same name, as engines expect of it.
            incarnation=time.time_ns(),
            max_queue=config.max_queue,
            suspect_after_s=config.heartbeat_timeout_s / 2,
            lost_after_s=config.heartbeat_timeout_s,
            ttft_slo_s=cluster.ttft_slo_s,
            tpot_slo_s=cluster.tpot_slo_s,
            roles=_roles(config),
            wanted=config.wanted,
        ),
        policy_name(cluster),
        in_one_place=cluster.pd == "off",
        kv_index=_has_index(config),
    )


def open_tape(config: ServeConfig) -> Tape:
    """Where the core's inputs are recorded. Raises `ConfigError`."""
    if config.record is None:
        return NO_TAPE
    path, worker = Path(config.record), config.cluster.api_worker
    if worker is not None and not path.is_dir():
        path = path.with_name(f"{path.name}.api-{worker}")
    facts = {"model": config.model, "seed": str(config.seed)}
    return FileTape(path, config.record_max_bytes, facts)


def build_app(generator: Generator, config: ServeConfig) -> FastAPI:
    """Loads the tokenizer and the chat template. Raises `StartupError`s."""
    checkpoint = resolve(config.model, revision=config.revision)
    texts = Texts.from_checkpoint(
        checkpoint,
        chat_template=config.chat_template,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
    settings = ApiConfig(
        served_model_names=config.served_model_names,
        api_keys=config.api_keys,
        admin_keys=config.admin_keys,
        max_body_bytes=config.max_body_bytes,
        seed=config.seed,
        generation_config=checkpoint.generation_config,
        log_requests=config.log_requests,
        trust_request_chat_template=config.trust_request_chat_template,
        otlp_traces_endpoint=config.otlp_traces_endpoint,
    )
    return create_app(generator, texts, settings)


def policy_name(cluster: ClusterConfig) -> str:
    if cluster.static_split is not None:
        return cluster.policy or "split"
    return cluster.policy or ("kv-aware" if cluster.pd == "off" else "slo-aware")


def several_instances(config: ServeConfig) -> bool:
    """Whether there are, or may be, others to choose from."""
    cluster = config.cluster
    return cluster.registry is not None or cluster.instances > 1 or len(config.engine_addresses) > 1


def _roles(config: ServeConfig) -> RoleKeeperConfig:
    cluster = config.cluster
    if cluster.pd == "off" or not several_instances(config):
        return RoleKeeperConfig()
    return RoleKeeperConfig(
        policy=RolesConfig(
            static=cluster.static_split,
            ttft_slo_s=cluster.ttft_slo_s,
            tpot_slo_s=cluster.tpot_slo_s,
        )
    )


def _has_index(config: ServeConfig) -> bool:
    wanted = config.cluster.kv_index
    return several_instances(config) if wanted is None else wanted

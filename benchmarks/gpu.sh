#!/usr/bin/env bash
# Run everything that needs a GPU: the compiled library, GPU tests, benchmarks, compute-sanitizer, launch configs.
#
#   benchmarks/gpu.sh [--part NAME]... [--seconds N] [--commit SHA] [--dry-run]
#   benchmarks/gpu.sh --prepare        first, on a machine with a package index: wheels for one without
#
# Parts, by value: tests core profile decode model nce memcheck lora tune core_heads layer logprob sanitizer lora_step
#                  vote generate lora_ranks scaling generate_long
# All parts before tune fit into three calls.
# A call ends within nine minutes (--seconds): each part has a time limit, and a part that no longer fits is not started.
# The last line of a call names the next call: start without --part, continue with that line. --dry-run shows the parts
# of every call if each took all of its limit.
# A part that fails or is stopped at its limit does not stop the others; the call then exits 1 at its end.
#
# Every call first compiles csrc/ with nvcc for this GPU, unless build/gpu-native/ has it already. If that fails, the
# parts still run, with torch in place of the library.
#
# The results are four files in ${OUT:-build/gpu}, rewritten after every part, so a killed call leaves them too:
#   results.jsonl   rows of all benchmark cases, in the format of benchmarks/results/
#   summary.txt     the parts that ran, their times and failures, the next call
#   logs.tar.gz     logs, tests.xml, reports of the benchmarks, tuned files (kernels/<op>/tuned/...)
#   native.tar.gz   the compiled library; unpacked in the checkout, it saves the next call from compiling
#
# Needs Python >= 3.11 with torch (CUDA), triton, transformers, numpy and pytest, setuptools and nvcc of the same CUDA;
# ninja makes compiling faster, pytest-xdist the tests. Without matplotlib there is no report.html. Missing packages are
# taken from build/gpu-wheels/ (--prepare) if it exists. Fetches nothing, installs nothing permanently.
# --commit names the commit measured if the files are not a git checkout.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "${root}"

total=540                # seconds of one call
readonly NATIVE_LIMIT=100 # seconds of those for compiling
readonly PARTS=( # by value: the most important first
  tests core profile decode model nce memcheck lora tune core_heads layer logprob sanitizer lora_step vote generate
  lora_ranks scaling generate_long
)
readonly -A LIMIT=(
  [tests]=180 [core]=90 [profile]=60 [decode]=100 [model]=150 [nce]=100 [memcheck]=190 [lora]=150 [tune]=280
  [core_heads]=110 [layer]=160 [logprob]=110 [sanitizer]=210 [lora_step]=140 [vote]=200 [generate]=300
  [lora_ranks]=240 [scaling]=230 [generate_long]=390
)
# fetched by --prepare; a machine uses only those it lacks. The first line: baselines that are rarely installed.
readonly WHEELS=(
  liger-kernel cut-cross-entropy
  pytest pytest-xdist execnet pytest-benchmark py-cpuinfo iniconfig pluggy packaging pygments
  matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six
  rich markdown-it-py mdurl ninja setuptools peft accelerate psutil
)
readonly WHEEL_FOLDER=build/gpu-wheels WORK=build/gpu-work
readonly -A WHAT=(
  [tests]="pytest -m gpu"
  [memcheck]="compute-sanitizer's memcheck on small calls of every kernel"
  [sanitizer]="racecheck, initcheck and synccheck on small calls of every kernel"
  [core]="benchmark cases X1 and X2: the attention core at head dim 128, beside FlexAttention and SDPA"
  [profile]="ncu on the forward kernel of X1: how long the tensor cores work"
  [core_heads]="benchmark cases X1 and X2 at head dims 64 and 256"
  [decode]="benchmark case X5: a decoding step, and its attention core"
  [layer]="benchmark cases X3 and X4: interval masks, the composition layer"
  [lora]="benchmark case D1 at rank 16: a layer with dual LoRA, forward, and with backward"
  [lora_ranks]="benchmark case D1 at ranks 8 and 64"
  [lora_step]="benchmark case D2: a decoding step of a layer with dual LoRA, as CUDA graphs"
  [nce]="benchmark case N1: the NCE loss, forward and backward"
  [logprob]="benchmark case L1: log-probabilities of targets"
  [vote]="benchmark case V1: votes, and curves of majority@k"
  [model]="benchmark case E1: a training step of a composed 8B- and 1B-class model"
  [generate]="benchmark case E2: generation with them, against recomputation"
  [generate_long]="benchmark case E2: 512 new tokens, against the two models alone"
  [scaling]="cost by number of augmenters and by length: whole model, one layer"
  [tune]="launch configs, written to kernels/<op>/tuned/<gpu>.json"
)

usage() {
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
}

dry=0
prepare=0
commit=""
chosen=()
while (($#)); do
  case "$1" in
    --part)
      if [[ $# -lt 2 || ! -v "LIMIT[${2:-}]" ]]; then
        echo "gpu.sh: \`--part\` must be one of ${PARTS[*]}, got '${2:-}'" >&2
        exit 2
      fi
      chosen+=("$2")
      shift 2
      ;;
    --seconds)
      total="${2:?gpu.sh: \`--seconds\` needs the seconds of this call}"
      shift 2
      ;;
    --prepare)
      prepare=1
      shift
      ;;
    --commit)
      commit="${2:?gpu.sh: \`--commit\` needs a commit}"
      shift 2
      ;;
    --dry-run)
      dry=1
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      echo "gpu.sh: unknown argument $1" >&2
      usage >&2
      exit 2
      ;;
  esac
done
((${#chosen[@]})) || chosen=("${PARTS[@]}")

if [[ ! "${total}" =~ ^[0-9]+$ ]]; then
  echo "gpu.sh: \`--seconds\` must be a number, got ${total}" >&2
  exit 2
fi

out="${OUT:-build/gpu}"
work="${WORK}"
python="${PYTHON:-python3}"
failed=()
summary=()
left=() # parts that no longer fit

# Fetch the wheels of all optional packages for another machine's Python (PREPARE_PYTHON), without dependencies.
prepare_wheels() {
  local name version="${PREPARE_PYTHON:-3.12}" platform platforms=() missing=()
  for platform in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux2010 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
  done
  mkdir -p "${WHEEL_FOLDER}"
  for name in "${WHEELS[@]}"; do
    "${python}" -m pip download -q --no-deps --only-binary=:all: --python-version "${version}" --implementation cp \
      "${platforms[@]}" -d "${WHEEL_FOLDER}" "${name}" || missing+=("${name}")
  done
  echo "gpu.sh: $(find "${WHEEL_FOLDER}" -name '*.whl' | wc -l) wheels for Python ${version}," \
    "$(du -sm "${WHEEL_FOLDER}" | cut -f1) MiB, in ${WHEEL_FOLDER}; take the folder along, git ignores it"
  if ((${#missing[@]})); then
    echo "gpu.sh: no wheel: ${missing[*]}" >&2
    exit 1
  fi
}

# Unpack the wheels of packages that this Python lacks into the folder of links.
use_wheels() {
  local site="$1" wheels=()
  mapfile -t wheels < <("${python}" - "${root}/${WHEEL_FOLDER}" <<'PY'
import pathlib
import sys
from importlib import metadata

for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        metadata.version(wheel.name.split("-")[0])
    except metadata.PackageNotFoundError:
        print(wheel)
PY
  )
  ((${#wheels[@]})) || return 0
  echo "from ${WHEEL_FOLDER}: ${wheels[*]##*/}"
  "${python}" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "${site}" "${wheels[@]}" || echo "gpu.sh: they could not be unpacked; continuing without" >&2
}

# Rewrite the files of this call: few, and complete whenever the call ends.
publish() {
  local line name
  if ((dry)); then return; fi
  {
    echo "commit ${measured}, ${SECONDS} s of ${total} s"
    printf '%s\n' "${summary[@]}"
    if ((${#left[@]})); then
      line="benchmarks/gpu.sh"
      for name in "${left[@]}"; do line+=" --part ${name}"; done
      echo "continue with: ${line}${commit:+ --commit ${commit}}"
    else
      echo "all requested parts have run"
    fi
  } >"${out}/summary.txt"
  find "${work}" -name results.jsonl -print0 | sort -z | xargs -0r cat >"${out}/results.jsonl"
  tar -czf "${out}/logs.tar.gz.new" -C "${work}" . && mv "${out}/logs.tar.gz.new" "${out}/logs.tar.gz"
}

# Run a command under a time limit with its output in a log, show the end of the log, and record a failure.
# With --dry-run only print the command.
step() {
  local name="$1" limit="$2" begin=${SECONDS} rc=0
  shift 2
  if ((dry)); then
    printf '  would run (at most %s s): %s\n' "${limit}" "$*"
    return 0
  fi
  echo "--- ${name}: $*"
  timeout --kill-after=10 "${limit}" "$@" >"${work}/${name}.log" 2>&1 || rc=$?
  tail -n 40 "${work}/${name}.log"
  case "${rc}" in
    0) summary+=("${name}: ok, $((SECONDS - begin)) s") ;;
    124 | 137) summary+=("${name}: STOPPED at its limit of ${limit} s") && failed+=("${name}") ;;
    *) summary+=("${name}: FAILED (exit ${rc}), $((SECONDS - begin)) s") && failed+=("${name}") ;;
  esac
}

# The package is spread over folders (setup.py); a folder of links is importable without an installation.
stage() {
  local site="$1" entry
  mkdir -p "${site}/calm_fast/kernels"
  for entry in "${root}"/calm_fast/*; do # leave out a library compiled for another torch
    [[ "${entry##*/}" == __pycache__ || "${entry##*/}" == kernels || "${entry}" == *.so ]] || ln -sfn "${entry}" "${site}/calm_fast/${entry##*/}"
  done
  for entry in "${root}"/calm_fast/kernels/*.py "${root}"/kernels/*/; do
    entry="${entry%/}" && ln -sfn "${entry}" "${site}/calm_fast/kernels/${entry##*/}"
  done
  ln -sfn "${root}/benchmarks" "${site}/calm_fast/benchmarks"
}

# Compile the library for this GPU into build/gpu-native/<hash of its inputs>, and link it into the package.
native() {
  local site="$1" key folder arch module
  if ((dry)); then
    step native "${NATIVE_LIMIT}" "${python}" setup.py build_ext --build-lib "build/gpu-native/<hash of csrc>"
    return
  fi
  arch="$("${python}" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')"
  key="$({
    "${python}" -c 'import sys, torch; print(sys.version, torch.__version__)'
    echo "${arch}"
    find csrc setup.py -type f -print0 | sort -z | xargs -0 sha256sum
  } | sha256sum | cut -c1-16)"
  folder="${root}/build/gpu-native/${key}"
  if [[ -f "${folder}/done" ]]; then
    summary+=("native: already compiled")
  else
    # without pyproject.toml beside it, setup.py needs no particular version of setuptools
    rm -rf "${folder}"
    mkdir -p "${folder}/source"
    ln -s "${root}/setup.py" "${root}/csrc" "${folder}/source/"
    step native "${NATIVE_LIMIT}" env -C "${folder}/source" CALM_FAST_NATIVE=1 CALM_FAST_CUDA=1 \
      TORCH_CUDA_ARCH_LIST="${arch}" "${python}" setup.py build_ext --build-lib "${folder}" \
      --build-temp "${folder}/objects"
    if ls "${folder}"/calm_fast/_c*.so >/dev/null 2>&1 && [[ " ${failed[*]} " != *" native "* ]]; then
      touch "${folder}/done"
      rm -rf "${folder}/source" "${folder}/objects"
      tar -czf "${out}/native.tar.gz" -C "${root}" "build/gpu-native/${key}"
    fi
  fi
  for module in "${folder}"/calm_fast/_c*.so; do
    if [[ -f "${module}" ]]; then ln -sfn "${module}" "${site}/calm_fast/${module##*/}"; fi
  done
  "${python}" -c 'from calm_fast.core import native_library; print("native:", native_library.build_info())' || true
}

check_needs() {
  "${python}" - <<'PY'
import importlib
import sys

problems = []
if sys.version_info < (3, 11):
    problems.append(f"Python >= 3.11 is needed, this is {sys.version.split()[0]}")
for name in ("torch", "triton", "transformers", "numpy", "rich", "pytest"):
    try:
        module = importlib.import_module(name)
        print(f"{name} {getattr(module, '__version__', '')}")
    except ImportError as failure:
        problems.append(f"{name} is missing: {failure}")
without = {
    "xdist": "the GPU tests run in one process and may not end in time",
    "pytest_benchmark": "nothing here needs it",
    "matplotlib": "no report.html",
    "ninja": "compiling takes longer",
    "setuptools": "the library cannot be compiled",
}
for name, effect in without.items():
    try:
        importlib.import_module(name)
    except ImportError:
        print(f"{name} is missing: {effect}")
if not problems:
    import torch

    import calm_fast.kernels  # the folder of links works

    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}, capability {torch.cuda.get_device_capability()}")
    else:
        problems.append(f"torch {torch.__version__} sees no GPU")
for problem in problems:
    print(f"gpu.sh: {problem}", file=sys.stderr)
sys.exit(bool(problems))
PY
}

part_tests() {
  local workers=() files=()
  # most of the time is spent compiling kernels, which several processes share
  if "${python}" -c "import xdist" 2>/dev/null; then workers=(-n 12); fi
  # only files with such tests: the import of another one must not end the run, nor every worker collect it.
  # addopts without --benchmark-disable, an option of pytest-benchmark; -v: a stopped run's log names the tests done;
  # warnings are not errors here: the packages are older than those of CI
  mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort)
  step tests "$1" "${python}" -m pytest -m gpu -v "${workers[@]}" -p no:cacheprovider \
    -p calm_fast.benchmarks.broken_context --continue-on-collection-errors \
    -o addopts="--import-mode=importlib --strict-markers --strict-config -ra" -o filterwarnings= --junitxml "${work}/tests.xml" \
    "${files[@]}"
}

# Print the path of a tool of CUDA, or its bare name in a dry run; nothing if it is missing.
cuda_tool() {
  local name="$1" path
  for path in "$(command -v "${name}" || true)" /usr/local/cuda*/bin/"${name}"; do
    if [[ -x "${path}" ]]; then
      echo "${path}"
      return
    fi
  done
  if ((dry)); then echo "${name}"; fi
}

# sanitize PART SECONDS TOOL...: a tool of compute-sanitizer has SECONDS.
sanitize() {
  local part="$1" each="$2" sanitizer tool
  shift 2
  sanitizer="$(cuda_tool compute-sanitizer)"
  if [[ -z "${sanitizer}" ]]; then
    echo "gpu.sh: compute-sanitizer is neither on the PATH nor in /usr/local/cuda*/bin" >&2
    summary+=("${part}: NOT RUN, compute-sanitizer is missing")
    failed+=("${part}")
    return
  fi
  for tool in "$@"; do
    # torch's caching allocator would hide an access beyond a tensor within its own pool
    step "sanitizer-${tool}" "${each}" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "${sanitizer}" --tool "${tool}" --error-exitcode 9 "${python}" -m calm_fast.benchmarks.sanitize
  done
}

part_memcheck() {
  local alone=40
  # first without a tool: check the results, and compile every kernel before the tool slows everything down
  step sanitizer-alone "${alone}" "${python}" -m calm_fast.benchmarks.sanitize
  sanitize memcheck "$(($1 - alone))" memcheck
}

part_sanitizer() { sanitize sanitizer "$(($1 / 3))" racecheck initcheck synccheck; }

part_profile() {
  local ncu
  ncu="$(cuda_tool ncu)"
  if [[ -z "${ncu}" ]]; then
    summary+=("profile: not run, ncu is missing")
    return
  fi
  # the third launch: the first two compile the kernel and warm the caches
  step profile "$1" "${ncu}" --clock-control none --kernel-name regex:cross_attention_fwd --launch-skip 2 \
    --launch-count 1 --section SpeedOfLight --section ComputeWorkloadAnalysis --section WarpStateStats \
    --print-details all "${python}" -m calm_fast.benchmarks.profiled
  if ((!dry)) && grep -q ERR_NVGPUCTRPERM "${work}/profile.log"; then # a setting of the machine, no fault of ours
    summary[-1]="profile: not run, this machine keeps its counters to administrators"
    unset 'failed[-1]'
  fi
}

# bench PART LIMIT OP ARGUMENT...: benchmark cases of an op; rows and report grow with every case.
bench() {
  local name="$1" limit="$2" op="$3"
  shift 3
  if [[ -n "${commit}" ]]; then set -- "$@" --commit "${commit}"; fi
  step "bench-${name}" "${limit}" "${python}" -m calm_fast.benchmarks.run --op "${op}" --device cuda \
    --seconds 3 --threads 8 "$@" --out "${work}/${name}"
}

part_core() { bench core "$1" cross_attention --case x1_ --case x2_; }

part_core_heads() { bench core_heads "$1" cross_attention --suite full --case _d64 --case _d256; }

part_decode() { bench decode "$1" cross_attention --case x5_; }

part_layer() { bench layer "$1" cross_attention --case x3_ --case x4_; }

part_lora() { bench lora "$1" dual_lora --case d1_; }

part_lora_ranks() { bench lora_ranks "$1" dual_lora --suite full --case _r8 --case _r64; }

part_lora_step() { bench lora_step "$1" dual_lora --suite full --case d2_; }

part_nce() { bench nce "$1" linear_nce --suite full --case n1; }

part_logprob() { bench logprob "$1" linear_logprob --suite full --case l1_; }

part_vote() { bench vote "$1" vote --op maj_at_k --suite full --case v1_; }

part_model() { bench model "$1" model --case e1_; }

part_generate() { bench generate "$1" model --case e2_generate; }

part_generate_long() { bench generate_long "$1" model --suite full --case e2_long; }

part_scaling() { bench scaling "$1" model --suite full --case s1_ --case s2_ --case s3_; }

part_tune() {
  step tune "$1" "${python}" -m calm_fast.benchmarks.tune --seconds "$(($1 - 30))" --out kernels
  ((dry)) || find kernels -path '*/tuned/*.json' -newer "${work}/started" -exec cp --parents {} "${work}/" \;
}

if ((prepare)); then
  prepare_wheels
  exit 0
fi

measured="${commit:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
if ((dry)); then
  echo "gpu.sh --dry-run: nothing below is run. Results would go to ${out}; commit ${measured}."
  echo "needs: Python >= 3.11 with torch (CUDA), triton, transformers, numpy, pytest; nvcc and setuptools for the" \
    "compiled library, compute-sanitizer for its part"
  echo "import: a temporary folder of links to calm_fast/, kernels/ and benchmarks/, on PYTHONPATH"
else
  rm -rf "${work}" # left by an earlier call
  mkdir -p "${out}" "${work}"
  out="$(cd "${out}" && pwd)" work="$(cd "${work}" && pwd)"
  rm -f "${out}"/{results.jsonl,summary.txt,logs.tar.gz,native.tar.gz}
  touch "${work}/started"
  site="$(mktemp -d)"
  trap 'rm -rf "${site}"' EXIT
  stage "${site}"
  export PYTHONPATH="${site}${PYTHONPATH:+:${PYTHONPATH}}"
  export PYTHONSAFEPATH=1 # the checkout's own calm_fast/ lacks the mapped folders: keep it off sys.path
  export PYTHONUNBUFFERED=1
  if compgen -G "${WHEEL_FOLDER}/*.whl" >/dev/null; then use_wheels "${site}"; fi
  check_needs 2>&1 | tee "${work}/needs.log"
  [[ "${measured}" != unknown ]] || echo "gpu.sh: not a git checkout: rows have no commit without --commit" >&2
fi

begin=${SECONDS}
echo "=== native: the compiled library, which every part uses"
native "${site:-}"
publish
call=1 reserved=${NATIVE_LIMIT} # a dry run adds up limits
for part in "${chosen[@]}"; do
  limit="${LIMIT[${part}]}"
  if ((dry && reserved + limit > total)); then
    ((reserved = NATIVE_LIMIT, ++call))
    echo "--- call ${call}"
  fi
  reserved=$((reserved + limit))
  echo "=== ${part}: ${WHAT[${part}]}"
  if ((!dry && SECONDS + limit > total)); then
    echo "gpu.sh: not started: ${SECONDS} s are spent, its limit is ${limit} s, a call has ${total} s" >&2
    summary+=("${part}: not run, no time left")
    left+=("${part}")
    continue
  fi
  "part_${part}" "${limit}"
  publish
done
if ((dry)); then
  echo "at most ${call} calls of ${total} s; fewer if parts end before their limits"
  exit 0
fi

publish
echo "=== summary, $((SECONDS - begin)) s, results in ${out}"
cat "${out}/summary.txt"
for file in "${work}"/*/report.md; do
  if [[ -f "${file}" ]]; then grep -E '^[|-]' "${file}" || true; fi
done
tail -n 1 "${out}/summary.txt"
if ((${#failed[@]})); then
  echo "gpu.sh: failed: ${failed[*]}" >&2
  exit 1
fi

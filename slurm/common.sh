# Sourced by the scripts here, inside a job: finds the code and the environment it runs in. Sets `phidias`, the words that start
# it. The script itself is a copy in Slurm's spool by then, so that it cannot know where it came from.

# Paths on the command line are relative to where it was submitted.
cd "$SLURM_SUBMIT_DIR"
# What `phidias submit` was told to run on every node first (cluster.setup).
set +u # `module` of many a site reads variables that are not set
eval "${PHIDIAS_SETUP:-}"
set -u

# The job's comment ends in the copy of the code that the run was frozen with: a requeue runs that, whatever has become of the
# repository meanwhile.
comment=""
for wait_s in 0 10 30 60; do # a controller that does not answer must not make a job take other code than its own
  sleep "$wait_s"
  if [[ -z ${SLURM_JOB_ID:-} ]] || comment=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%k); then break; fi
done
comment=${comment%%$'\n'*} # elements of an array carry the same
comment=${comment%"${comment##*[![:space:]]}"} # squeue pads
code=${PHIDIAS_CODE:-}
if [[ $comment == /*:*:* ]]; then
  copy=${comment%:*:*}/code/${comment##*:}
  if [[ -d $copy ]]; then code=$copy; fi
fi
if [[ -n $code ]]; then export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"; fi

if [[ -n ${PHIDIAS_PYTHON:-} ]]; then
  phidias=("$PHIDIAS_PYTHON" -P -m launcher) # of the one who submitted; -P: the folder it works in is not code
elif [[ -x .venv/bin/phidias ]]; then
  phidias=(.venv/bin/phidias)
else
  phidias=(phidias)
fi
if ! command -v "${phidias[0]}" >/dev/null; then
  echo "no ${phidias[0]} on $(hostname): run 'make setup' in $PWD, or submit from an environment that this node sees too" >&2
  exit 2
fi

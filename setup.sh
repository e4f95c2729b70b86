# Sourced by quickstart.sh and runtests.sh: creates .venv with requirements.txt, once, and activates it.
python=$(command -v python3 || command -v python)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed; $("$python" --version) was found at $python" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# shellcheck disable=SC1091
. .venv/bin/activate
wanted=$(cat requirements.txt pyproject.toml | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing requirements.txt into .venv (a few minutes, once)"
  pip install --quiet --disable-pip-version-check -r requirements.txt
  pip install --quiet --disable-pip-version-check --no-deps -e .
  echo "$wanted" >.venv/installed
fi

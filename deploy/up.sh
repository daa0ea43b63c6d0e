#!/usr/bin/env bash
# up.sh: brings up compose.yaml, says what it waits for, and ends when everything is healthy; or says what is not, and why.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { printf '\nmake: %s\n' "$@" >&2; exit 1; }
value() { awk -F= -v name="$1" '$1 == name { found = $2 } END { print found }' .env; }

command -v docker >/dev/null || die "There is no docker here. Install Docker Engine with its compose plugin, 2.24 or newer."
docker compose version >/dev/null 2>&1 || die "docker has no compose plugin. On Debian and Ubuntu: apt install docker-compose-plugin"
docker info >/dev/null 2>&1 || die "The Docker engine does not answer. Is it running (systemctl start docker)? May you use it (group docker)?
$(docker info 2>&1 | tail -n 1)"
if ! [ -e .env ]; then
    key=sk-$(head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=')
    { cat .env.example && printf '\n# Made by make up.\nXGEN_API_KEYS=%s\n' "$(printf %s "$key" | sha256sum | cut -d ' ' -f 1)"; } >.env
    printf 'make: made .env out of .env.example, and a key for clients, which is shown only now:\n\n  %s\n\n' "$key"
fi
if [ -z "${XGEN_API_KEYS-}$(value XGEN_API_KEYS)${API_KEYS_FILE-}$(value API_KEYS_FILE)" ]; then
    die "The proxy does not start without keys, or the word none. Add to .env:
XGEN_API_KEYS=none, if everybody who can connect may use the models;
or the hash of a key: docker compose run --rm --no-deps proxy key"
fi

engine=${ENGINE:-$(value ENGINE)}
engine=${engine:-llama-cpp-python}
if ! docker image inspect "xgen-$engine" >/dev/null 2>&1; then
    echo "make: the first start takes a while: it builds the images$(
        [ "$engine" != llama-cpp-python ] || printf ' (llama-cpp-python is compiled: 5 to 20 minutes)'
    ), fetches the model (93 MB) and starts each service when those it needs are healthy"
fi
case ${VLLM_URL:-$(value VLLM_URL)} in
    '' | dns://vllm:*) ;;
    *) case ${COMPOSE_FILE:-$(value COMPOSE_FILE)} in
        '' | compose.yaml) die "The proxies cannot reach VLLM_URL, since their network has no way out. Add to .env:
COMPOSE_FILE=compose.yaml:deploy/vllm-elsewhere.yaml" ;;
    esac ;;
esac
case ,${COMPOSE_PROFILES:-$(value COMPOSE_PROFILES)}, in
    *,gpu,*) echo "make: vLLM downloads its model the first time, and takes a minute or more to start each time" ;;
esac

# What has failed, and its last words.
show_state() {
    local id name
    for id in $(docker compose ps -aq); do
        name=$(docker inspect -f '{{.Name}} {{.State.Status}} {{.State.ExitCode}} {{with .State.Health}}{{.Status}}{{end}}' "$id")
        case $name in
            *' running 0 'healthy | *' running 0 ' | *' exited 0 '* | *' created '*) ;;
            *) printf '\n%s; its last words:\n' "${name#/}" && docker logs --tail 15 "$id" 2>&1 | sed 's/^/  | /' ;;
        esac
    done
}

docker compose up -d --build --remove-orphans --wait || { show_state >&2; die "Not everything came up, see above. Correct it and run make up again"; }

address=$(docker compose port nginx 443)
keys=${XGEN_API_KEYS:-$(value XGEN_API_KEYS)}
header=" -H 'Authorization: Bearer ${key:-KEY}'"
[ "$keys" != none ] || header=
echo "
make: it is up. Try it (-k, since the first certificate is self-signed):

  curl -k https://${address/0.0.0.0/localhost}/v1/chat/completions -H 'Content-Type: application/json'$header \\
    -d '{\"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France? Answer in one word.\"}], \"temperature\": 0}'

To see what it does: make logs. To end it: make down."

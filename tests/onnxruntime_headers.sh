#!/usr/bin/env bash
# ONNX Runtime's C++ headers, which are in no wheel: Debian 13's package of them is unpacked into a folder. Nothing is
# installed and no root is needed; the mirrors are those that this machine's own apt has. Does nothing without apt.
set -euo pipefail
mkdir -p "$1"
out=$(cd "$1" && pwd)
command -v apt-get >/dev/null || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work"/sources "$work"/state/lists/partial "$work"/cache/archives/partial
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-trixie}")
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
  [ -f "$file" ] && sed "s/\b$codename\b/trixie/g" "$file" >"$work/sources/$(basename "$file")"
done
touch "$work"/sources.list "$work"/status
apt=(apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts="$work/sources"
  -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache"
  -o APT::Sandbox::User="$(id -un)")
"${apt[@]}" update
(cd "$work" && "${apt[@]}" download libonnxruntime-dev && dpkg -x libonnxruntime-dev_*.deb unpacked)
cp -r "$work"/unpacked/usr/include/onnxruntime/. "$out"

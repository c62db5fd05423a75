#!/usr/bin/env bash
# ONNX Runtime's C++ headers and C# sources, which are in no wheel: out of Debian 13's source package, into the folders
# include and csharp of a folder. Nothing is installed and no root is needed; the mirrors are those that this machine's
# own apt has. Does nothing without apt.
set -euo pipefail
rm -rf "$1"
mkdir -p "$1"/include "$1"/csharp
out=$(cd "$1" && pwd)
command -v apt-get >/dev/null || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
mkdir -p "$work"/sources "$work"/state/lists/partial "$work"/cache/archives/partial
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-trixie}")
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
  [ -f "$file" ] && sed -E "s/\b$codename\b/trixie/g; s/^(Types: *)?deb( |$)/\1deb-src\2/" "$file" >"$work/sources/$(basename "$file")"
done
touch "$work"/sources.list "$work"/status
apt=(apt-get -qq -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts="$work/sources"
  -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache"
  -o APT::Sandbox::User="$(id -un)")
"${apt[@]}" update
(cd "$work" && "${apt[@]}" source --download-only --tar-only onnxruntime)
tar -xJf "$work"/onnxruntime_*.orig.tar.xz -C "$work" --wildcards '*/include/onnxruntime/core/session/*.h' '*/csharp/src/Microsoft.ML.OnnxRuntime/*.cs'
cp "$work"/onnxruntime-*/include/onnxruntime/core/session/*.h "$out"/include
cp "$work"/onnxruntime-*/csharp/src/Microsoft.ML.OnnxRuntime/{,Tensors/}*.cs "$out"/csharp

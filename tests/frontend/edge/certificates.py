"""Certificates of a server and a client, made for one run of the tests."""

import subprocess
from pathlib import Path


def tls_settings(directory: Path, *, mutual: bool = False, name: str = "server") -> dict[str, Path]:
    """Of a frontend that speaks TLS, with the certificate of that name."""
    found = {"tls_certificate": directory / f"{name}.pem", "tls_key": directory / f"{name}.key"}
    return found | ({"tls_client_ca": directory / "ca.pem"} if mutual else {})


def make_certificates(directory: Path) -> None:
    """An authority (ca), and what it signed: server, client, elsewhere (another name), expired.

    And a stranger, who signed himself.
    """

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca = ("-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "3650")
    openssl("req", "-x509", *new_key, *ca)
    stranger = ("-keyout", "stranger.key", "-out", "stranger.pem", "-subj", "/CN=stranger")
    openssl("req", "-x509", *new_key, *stranger, "-days", "3650")
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    (directory / "other-names").write_text("subjectAltName=DNS:elsewhere.test")
    for name in ("server", "client", "elsewhere", "expired"):
        request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("req", *new_key, *request)
        days = "-1" if name == "expired" else "3650"
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", days)
        names = "other-names" if name == "elsewhere" else "names"
        where = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", names)
        openssl("x509", "-req", *signing, *where)

"""What a party may be called: in settings files, in identity files and on the wire alike."""

NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,31}"
NAME_RULE = "1 to 32 lower-case letters, digits, - and _, the first of them a letter or digit"
COORDINATOR = "coordinator"  # the name of the party that no owner may have
# A party's files have its name, and these lie beside them: agreement.toml, ca.key, coordinator.toml, server.key.
TAKEN_NAMES = {
    "agreement": "the agreement's",
    "ca": "the root certificate's",
    COORDINATOR: "the coordinator's",
    "server": "the server's",
}

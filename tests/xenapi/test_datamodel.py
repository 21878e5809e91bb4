import pytest

from gateway.core.roles import Role
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.datamodel import ApiClass, Field, Message, fixed, stored
from gateway.xenapi.types import STRING, MapOf, Reference, SetOf

METHODS = [(model, called) for model in CLASSES for called in model.all_messages.values()]
FIELDS = [(model, field) for model in CLASSES for field in model.fields]


def _named(pair: tuple[ApiClass, Field | Message]) -> str:
    return f"{pair[0].name}.{pair[1].name}"


@pytest.mark.parametrize("pair", FIELDS, ids=_named)
def test_every_field_has_a_getter_of_its_type_for_who_may_look(
    pair: tuple[ApiClass, Field],
) -> None:
    model, field = pair
    getter = model.all_messages[f"get_{field.name}"]
    assert getter.result == field.type
    assert getter.role is model.reader is (Role.POOL_ADMIN if model.name == "user" else Role.READ_ONLY)
    assert [parameter.type for parameter in getter.parameters] == [Reference(model.name)]


@pytest.mark.parametrize("pair", FIELDS, ids=_named)
def test_every_field_that_may_be_changed_has_all_its_setters_and_others_have_none(
    pair: tuple[ApiClass, Field],
) -> None:
    model, field = pair
    setters = {f"set_{field.name}"}
    if isinstance(field.type, MapOf):
        setters |= {f"add_to_{field.name}", f"remove_from_{field.name}"}
    if isinstance(field.type, SetOf):
        setters |= {f"add_{field.name}", f"remove_{field.name}"}
    there = {name for name in setters if name in model.all_messages}
    if field.writer is not None:
        assert there == setters
        assert {model.all_messages[name].role for name in there} == {field.writer}
    else:
        by_hand = {called.name for called in model.messages}
        assert there <= by_hand


@pytest.mark.parametrize("model", [each for each in CLASSES if each.objects], ids=lambda model: model.name)
def test_every_class_with_objects_has_a_record_and_a_uuid(model: ApiClass) -> None:
    assert {"get_record", "get_uuid"} <= set(model.all_messages)


@pytest.mark.parametrize("model", CLASSES, ids=lambda model: model.name)
def test_every_enumerable_class_can_be_listed_and_searched(model: ApiClass) -> None:
    queries = {"get_all", "get_all_records_where", "get_by_uuid"}
    assert queries <= set(model.all_messages) if model.enumerable else not queries & set(model.all_messages)
    has_names = any(field.name == "name_label" for field in model.fields)
    assert ("get_by_name_label" in model.all_messages) == has_names


def test_sessions_are_not_looked_up_because_their_references_are_secrets() -> None:
    session = next(model for model in CLASSES if model.name == "session")
    assert not {"get_all", "get_all_records_where", "get_by_uuid"} & set(session.all_messages)
    assert not session.all_messages["get_all_records"].listed
    assert session.all_messages["get_all_records"].role is Role.POOL_ADMIN


@pytest.mark.parametrize("pair", METHODS, ids=_named)
def test_every_method_is_documented(pair: tuple[ApiClass, Message]) -> None:
    _, called = pair
    assert called.doc.endswith(".")
    assert called.result.name
    for parameter in called.parameters:
        assert parameter.doc
        assert parameter.type.name


@pytest.mark.parametrize("pair", FIELDS, ids=_named)
def test_every_field_is_documented(pair: tuple[ApiClass, Field]) -> None:
    assert pair[1].doc
    assert not pair[1].doc.endswith(".")


XENAPI_VDI_RECORD = """
    uuid name_label name_description allowed_operations current_operations SR VBDs crash_dumps virtual_size
    physical_utilisation type sharable read_only other_config storage_lock location managed missing parent
    xenstore_data sm_config is_a_snapshot snapshot_of snapshots snapshot_time tags allow_caching on_boot
    metadata_of_pool metadata_latest is_tools_iso cbt_enabled
""".split()  # noqa: SIM905 - a table of words
XENAPI_SR_RECORD = """
    uuid name_label name_description allowed_operations current_operations VDIs PBDs virtual_allocation
    physical_utilisation physical_size type content_type shared other_config tags sm_config blobs
    local_cache_enabled introduced_by clustered is_tools_sr
""".split()  # noqa: SIM905 - a table of words
XENAPI_TASK_RECORD = """
    uuid name_label name_description allowed_operations current_operations created finished status resident_on
    progress type result error_info other_config subtask_of subtasks backtrace
""".split()  # noqa: SIM905 - a table of words


@pytest.mark.parametrize(
    ("name", "fields"), [("VDI", XENAPI_VDI_RECORD), ("SR", XENAPI_SR_RECORD), ("task", XENAPI_TASK_RECORD)]
)
def test_records_have_xenapis_fields(name: str, fields: list[str]) -> None:
    model = next(model for model in CLASSES if model.name == name)
    assert [field.name for field in model.fields] == fields


def test_a_class_that_declares_a_field_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="declared twice"):
        ApiClass(
            name="thing",
            doc="A thing.",
            fields=(stored("uuid", STRING, "id"), fixed("uuid", STRING, "", "id")),
            objects=lambda estate: estate.records.vdis,
        )

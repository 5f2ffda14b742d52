//! What keys say that objects are.

use std::sync::Arc;

use epochfs_format::{
    BIRTHS_PREFIX, DESCRIPTOR_KEY, GC_LOG_PREFIX, KEYS_PREFIX, ObjectRef, QUARANTINE_PREFIX, RESERVE_KEY, SUMMARY_STEP,
    gc_record_key, key_removal_key, parse_host_key, parse_id, parse_lease_key, parse_pack_key, record_seq, summary_key,
};

use crate::repo::object_key;

pub enum Named {
    Descriptor,
    Object(ObjectRef),
    /// A hint, or room kept free: it makes no difference to any epoch.
    Trace,
    /// A record of the collector's log, or what readers and writers tell it.
    OfCollector,
    /// The summary of a machine's log up to this record.
    Summary(Arc<str>, u64),
    /// A list of damaged blocks.
    Quarantine,
    /// A key that opens the repository, or that one does no longer.
    Key,
    /// What a host says of itself, or is told.
    OfHost,
    Unknown,
}

fn is_of_keyring(key: &str) -> bool {
    let is_removal = record_seq(key).is_some_and(|number| key_removal_key(number) == key);
    is_removal || key.strip_prefix(KEYS_PREFIX).is_some_and(|name| parse_id(name).is_some())
}

fn is_of_collector(key: &str) -> bool {
    let is_birth = key.strip_prefix(BIRTHS_PREFIX).is_some_and(|name| parse_id(name).is_some());
    let is_record = key.starts_with(GC_LOG_PREFIX) && record_seq(key).is_some_and(|seq| gc_record_key(seq) == key);
    is_birth || is_record || parse_lease_key(key).is_some()
}

/// What an object's key says that it is.
pub fn name_of(key: &str) -> Named {
    if key == DESCRIPTOR_KEY {
        return Named::Descriptor;
    }
    if key.starts_with("traces/") && epochfs_format::trace_seq(key).is_some() {
        return Named::Trace;
    }
    if is_of_keyring(key) {
        return Named::Key;
    }
    if key == RESERVE_KEY {
        return Named::Trace;
    }
    if is_of_collector(key) {
        return Named::OfCollector;
    }
    if key.strip_prefix(QUARANTINE_PREFIX).is_some_and(|name| parse_id(name).is_some()) {
        return Named::Quarantine;
    }
    if parse_host_key(key).is_some() {
        return Named::OfHost;
    }
    let object = if let Some(pack) = parse_pack_key(key) {
        Some(ObjectRef::Pack(pack))
    } else if let Some(rest) = key.strip_prefix("machines/") {
        let machine = rest.split('/').next().and_then(epochfs_format::decode_component);
        if let Some((machine, to)) = machine.as_deref().zip(record_seq(key))
            && to > 0
            && to.is_multiple_of(SUMMARY_STEP)
            && summary_key(machine, to) == key
        {
            return Named::Summary(machine.into(), to);
        }
        machine.zip(record_seq(key)).map(|(machine, seq)| ObjectRef::Record { machine: machine.into(), seq })
    } else {
        None
    };
    match object {
        Some(object) if object_key(&object) == key => Named::Object(object),
        _ => Named::Unknown,
    }
}

//! Names: of machines, streams and tags, and the object keys made of them.

use crate::error::{FormatError, Result};

/// The longest name of a machine or a tag, in bytes.
pub const NAME_LEN_MAX: usize = 128;

/// The longest name of a directory that every store takes, in bytes.
const COMPONENT_LEN_MAX: usize = 255;

/// The longest path of a stream, in bytes.
pub const STREAM_PATH_LEN_MAX: usize = 4096;

fn refuse<T>(what: &'static str, why: &'static str) -> Result<T> {
    Err(FormatError::Name { what, why })
}

fn check_name(what: &'static str, name: &str) -> Result<()> {
    if name.is_empty() {
        return refuse(what, "it is empty");
    }
    if name.len() > NAME_LEN_MAX {
        return refuse(what, "it is longer than 128 bytes");
    }
    if name.starts_with(['.', '-']) {
        return refuse(what, "it begins with a dot or a dash");
    }
    if name.chars().any(char::is_control) {
        return refuse(what, "it holds a newline or another control character");
    }
    if name.contains(['/', '@', '\\']) {
        return refuse(what, "it holds a slash, a backslash or an @");
    }
    Ok(())
}

/// A machine's name is a directory name on the mount and stands before the `@` in `MACHINE@EPOCH`.
pub fn check_machine(name: &str) -> Result<()> {
    const WHAT: &str = "machine name";
    check_name(WHAT, name)?;
    // It also names a directory of the store, where most bytes that are not letters or digits take three.
    if encode_component(name).len() > COMPONENT_LEN_MAX {
        return refuse(WHAT, "it takes more than 255 bytes as the name of a directory of the repository");
    }
    Ok(())
}

/// A tag stands where an epoch's number may stand, so it is not a number, nor `latest`.
pub fn check_tag(name: &str) -> Result<()> {
    check_name("tag", name)?;
    if name == "latest" || name.bytes().all(|byte| byte.is_ascii_digit()) {
        return refuse("tag", "numbers and the word latest name epochs by themselves");
    }
    Ok(())
}

/// A stream's path below its machine's `live/`: any names that files may have, with slashes between them.
pub fn check_stream_path(path: &[u8]) -> Result<()> {
    const WHAT: &str = "stream name";
    if path.is_empty() {
        return refuse(WHAT, "it is empty");
    }
    if path.len() > STREAM_PATH_LEN_MAX {
        return refuse(WHAT, "it is longer than 4,096 bytes");
    }
    if path.contains(&0) {
        return refuse(WHAT, "it holds a zero byte");
    }
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" => return refuse(WHAT, "it begins or ends with a slash, or has two in a row"),
            b"." | b".." => return refuse(WHAT, "it holds the directory . or .."),
            _ if part.len() > COMPONENT_LEN_MAX => return refuse(WHAT, "a part of it is longer than 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

/// Records of one log directory: finding the newest takes one listing of directories and one of a directory.
pub const RECORDS_A_SEGMENT: u64 = 1000;

/// The key of the repository's descriptor.
pub const DESCRIPTOR_KEY: &str = "epochfs.json";

/// All packs are below it.
pub const PACKS_PREFIX: &str = "packs/";

/// The key of a pack.
pub fn pack_key(id: &[u8; 16]) -> String {
    [PACKS_PREFIX, &hex(&id[..1]), "/", &hex(id)].concat()
}

/// The pack that a key names.
pub fn parse_pack_key(key: &str) -> Option<[u8; 16]> {
    key.rsplit('/').next().and_then(parse_id).filter(|_| key.starts_with(PACKS_PREFIX))
}

/// Where a machine's log lies, with a slash at the end.
pub fn log_prefix(machine: &str) -> String {
    format!("machines/{}/log/", encode_component(machine))
}

/// A log segment's directory name.
pub fn segment_name(segment: u64) -> String {
    format!("{segment:012}")
}

/// The key of a log record.
pub fn record_key(machine: &str, seq: u64) -> String {
    format!("{}{}/{seq:016}", log_prefix(machine), segment_name(seq / RECORDS_A_SEGMENT))
}

/// The key of the summary of a machine's log up to this record.
pub fn summary_key(machine: &str, to: u64) -> String {
    format!("machines/{}/summaries/{to:016}", encode_component(machine))
}

/// The record number that a record's key ends with.
pub fn record_seq(key: &str) -> Option<u64> {
    let name = key.rsplit('/').next()?;
    if name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_digit()) { name.parse().ok() } else { None }
}

/// Where the traces of a stream lie, the newest with the highest number: `<prefix><number>`.
pub fn trace_prefix(machine: &str, stream: &[u8]) -> String {
    // Paths may be longer than names.
    let mut hasher = blake3::Hasher::new_derive_key("EpochFS v1 stream of a trace");
    let stream = hasher.update(stream).finalize();
    format!("{}{}/", machine_traces_prefix(machine), hex(&stream.as_bytes()[..16]))
}

/// Where all traces of a machine lie.
pub fn machine_traces_prefix(machine: &str) -> String {
    format!("traces/{}/", encode_component(machine))
}

/// The number of a trace, from its key.
pub fn trace_seq(key: &str) -> Option<u64> {
    let name = key.rsplit('/').next()?;
    if name.len() == 12 && name.bytes().all(|byte| byte.is_ascii_digit()) { name.parse().ok() } else { None }
}

/// Where the collector's log lies.
pub const GC_LOG_PREFIX: &str = "gc/log/";

/// The key of a record of the collector's log.
pub fn gc_record_key(seq: u64) -> String {
    format!("{GC_LOG_PREFIX}{seq:016}")
}

/// Bytes that mean nothing, kept so that they can be given up when a disk is full.
pub const RESERVE_KEY: &str = "gc/reserve";

/// Where readers say what they read.
pub const READERS_PREFIX: &str = "gc/readers/";

/// The key of a reader's lease.
pub fn lease_key(reader: &[u8; 16], number: u64) -> String {
    format!("{READERS_PREFIX}{}-{number:016}", hex(reader))
}

/// The reader and number of a lease, from its key.
pub fn parse_lease_key(key: &str) -> Option<([u8; 16], u64)> {
    let (reader, number) = key.strip_prefix(READERS_PREFIX)?.split_once('-')?;
    let parsed = (parse_id(reader)?, record_seq(number)?);
    (lease_key(&parsed.0, parsed.1) == key).then_some(parsed)
}

/// Where commits to machines that have no log yet are announced.
pub const BIRTHS_PREFIX: &str = "gc/births/";

/// The key by which a commit to a machine without a log is announced.
pub fn birth_key(writer: &[u8; 16]) -> String {
    format!("{BIRTHS_PREFIX}{}", hex(writer))
}

/// Where it is said which blocks are known to be damaged.
pub const QUARANTINE_PREFIX: &str = "quarantine/";

/// The key of a list of damaged blocks.
pub fn quarantine_key(id: &[u8; 16]) -> String {
    format!("{QUARANTINE_PREFIX}{}", hex(id))
}

/// Where hosts say that they live, and are told what they are there for.
pub const HOSTS_PREFIX: &str = "hosts/";

/// What an object below [`HOSTS_PREFIX`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostObject {
    Heartbeat(u64),
    Order(u64),
}

/// Where all objects of a host lie.
pub fn host_prefix(host: &[u8; 16]) -> String {
    format!("{HOSTS_PREFIX}{}/", hex(host))
}

/// The key of a host's heartbeat.
pub fn heartbeat_key(host: &[u8; 16], number: u64) -> String {
    format!("{}{number:016}", host_prefix(host))
}

/// The key of what a host is told.
pub fn host_order_key(host: &[u8; 16], number: u64) -> String {
    format!("{}order-{number:016}", host_prefix(host))
}

/// The host, and which of its objects this is, from its key.
pub fn parse_host_key(key: &str) -> Option<([u8; 16], HostObject)> {
    let (host, name) = key.strip_prefix(HOSTS_PREFIX)?.split_once('/')?;
    let host = parse_id(host)?;
    let object = match name.strip_prefix("order-") {
        Some(number) => HostObject::Order(record_seq(number)?),
        None => HostObject::Heartbeat(record_seq(name)?),
    };
    Some((host, object))
}

/// Letters, digits, dots, dashes and underscores as they are, every other byte as %XX: safe on every store.
pub fn encode_component(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"._-".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The name that `encode_component` made this of, if it did.
pub fn decode_component(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let pair = [bytes.next()?, bytes.next()?];
            out.push(u8::from_str_radix(std::str::from_utf8(&pair).ok()?, 16).ok()?);
        } else {
            out.push(byte);
        }
    }
    let name = String::from_utf8(out).ok()?;
    (encode_component(&name) == text).then_some(name)
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

/// Sixteen bytes from 32 lower-case hexadecimal digits.
pub fn parse_id(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_come_back() {
        for name in ["web1", "a b", "ü", "x.y_z-1", "%41"] {
            assert_eq!(decode_component(&encode_component(name)).as_deref(), Some(name));
        }
        for text in ["%4", "%zz", "%41", "a b", "%c3"] {
            assert_eq!(decode_component(text), None, "{text}");
        }
    }

    #[test]
    fn names_are_checked() {
        for name in ["web1", "a b", "ü", "a.b", "x=y"] {
            assert!(check_machine(name).is_ok(), "{name}");
        }
        assert!(check_machine(&"x".repeat(128)).is_ok() && check_machine(&"ü".repeat(42)).is_ok());
        for name in ["", ".x", "-x", "a/b", "a\nb", "a@b", "a\\b", &"x".repeat(129), &"ü".repeat(43)] {
            assert!(check_machine(name).is_err(), "{name}");
        }
        for name in ["latest", "17", ""] {
            assert!(check_tag(name).is_err(), "{name}");
        }
        for path in [&b"memory"[..], b"a/b", b"a\nb", b"...", b"\xff"] {
            assert!(check_stream_path(path).is_ok(), "{path:?}");
        }
        for path in [&b""[..], b"/a", b"a/", b"a//b", b".", b"a/..", b"a\0"] {
            assert!(check_stream_path(path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn ids_come_back() {
        let id = [0x0a; 16];
        assert_eq!(parse_id(&hex(&id)), Some(id));
        assert_eq!(parse_id("+0000000000000000000000000000000"), None);
        assert_eq!(record_seq(&record_key("web1", 12_345)), Some(12_345));
    }
}

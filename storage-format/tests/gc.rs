//! The collector's records and readers' leases: their bytes stay what they were, and damage is refused.

mod bytes;

use bytes::{golden, resealed};
use epochfs_format::{
    Birth, FormatError, GcBody, GcRecord, Lease, ObjectRef, birth_key, gc_record_key, lease_key, parse_lease_key,
};

const REPOSITORY: [u8; 16] = *b"0123456789abcdef";

fn record(seq: u64, body: GcBody) -> GcRecord {
    GcRecord { repository: REPOSITORY, seq, writer: *b"writer-of-record", time_ns: 1_790_000_000_123_456_789, body }
}

fn records() -> Vec<(&'static str, GcRecord)> {
    let objects = vec![
        ObjectRef::Pack(*b"fedcba9876543210"),
        ObjectRef::Pack(*b"gedcba9876543210"),
        ObjectRef::Record { machine: "web1".into(), seq: 42 },
    ];
    let kept = objects[..1].to_vec();
    vec![
        ("condemn", record(41, GcBody::Condemn { objects })),
        ("fence", record(42, GcBody::Fence { condemned: 41 })),
        ("delete", record(43, GcBody::Delete { condemned: 41, kept })),
        ("done", record(44, GcBody::Done { condemned: 41 })),
    ]
}

fn lease() -> Lease {
    Lease {
        repository: REPOSITORY,
        reader: *b"a reader 1234567",
        number: 17,
        heeded: 42,
        lease_ms: 60_000,
        host: "rack4-node7".into(),
        held: vec![("web1".into(), 17), ("db 1".into(), 3)],
    }
}

#[test]
fn records_are_read_as_what_they_mean_and_written_as_they_are() {
    for (name, record) in records() {
        let bytes = golden(&format!("gc/{name}.bin"), &record.encode());
        assert_eq!(bytes, record.encode(), "{name}");
        assert_eq!(GcRecord::decode(&bytes, &REPOSITORY, record.seq).unwrap(), record);
        assert!(matches!(GcRecord::decode(&bytes, &[0; 16], record.seq), Err(FormatError::Mismatch { .. })));
        assert!(matches!(GcRecord::decode(&bytes, &REPOSITORY, record.seq + 4), Err(FormatError::Mismatch { .. })));
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert!(GcRecord::decode(&flipped, &REPOSITORY, record.seq).is_err(), "{name} flipped at {at}");
            assert!(GcRecord::decode(&bytes[..at], &REPOSITORY, record.seq).is_err(), "{name} cut at {at}");
        }
        let newer = resealed(&bytes, |body| body[8] = 2);
        assert!(matches!(
            GcRecord::decode(&newer, &REPOSITORY, record.seq),
            Err(FormatError::NewerVersion { found: 2, .. })
        ));
        let longer = resealed(&bytes, |body| body.push(0));
        assert!(matches!(GcRecord::decode(&longer, &REPOSITORY, record.seq), Err(FormatError::Invalid { .. })));
    }
}

#[test]
fn a_step_that_is_not_due_is_refused() {
    for (name, record) in records() {
        let moved = GcRecord { seq: record.seq + 1, ..record.clone() };
        let decoded = GcRecord::decode(&moved.encode(), &REPOSITORY, moved.seq);
        assert!(matches!(decoded, Err(FormatError::Invalid { .. })), "{name}");
    }
}

#[test]
fn hostile_counts_and_orders_are_refused() {
    let bytes = records()[0].1.encode();
    // Behind magic, version, repository, number, writer, time and kind.
    let count = 8 + 2 + 16 + 8 + 16 + 8 + 1;
    let hostile = resealed(&bytes, |body| body[count..count + 4].fill(0xff));
    assert!(GcRecord::decode(&hostile, &REPOSITORY, 41).is_err());
    let unordered = resealed(&bytes, |body| body[count + 4 + 1] = b'z');
    assert!(matches!(GcRecord::decode(&unordered, &REPOSITORY, 41), Err(FormatError::Invalid { .. })));
}

#[test]
fn leases_are_read_as_what_they_mean_and_written_as_they_are() {
    let bytes = golden("gc/lease.bin", &lease().encode());
    assert_eq!(bytes, lease().encode());
    assert_eq!(Lease::decode(&bytes, &REPOSITORY).unwrap(), lease());
    assert!(matches!(Lease::decode(&bytes, &[0; 16]), Err(FormatError::Mismatch { .. })));
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        assert!(Lease::decode(&flipped, &REPOSITORY).is_err(), "flipped at {at}");
    }
    let hostile = resealed(&bytes, |body| {
        let count = 8 + 2 + 16 + 16 + 8 + 8 + 4 + 12;
        body[count..count + 4].fill(0xff);
    });
    assert!(Lease::decode(&hostile, &REPOSITORY).is_err());
    let mut long = lease();
    long.host = "\u{fc}".repeat(200);
    assert_eq!(Lease::decode(&long.encode(), &REPOSITORY).unwrap().host, "\u{fc}".repeat(127));
}

#[test]
fn keys_are_what_the_format_says() {
    assert_eq!(gc_record_key(41), "gc/log/0000000000000041");
    let id = *b"fedcba9876543210";
    let key = lease_key(&id, 17);
    assert_eq!(key, "gc/readers/66656463626139383736353433323130-0000000000000017");
    assert_eq!(parse_lease_key(&key), Some((id, 17)));
    assert_eq!(parse_lease_key("gc/readers/x-17"), None);
    assert_eq!(birth_key(&id), "gc/births/66656463626139383736353433323130");
}

#[test]
fn announcements_are_read_as_what_they_mean_and_written_as_they_are() {
    let birth = Birth { repository: REPOSITORY, machine: "db 1".into() };
    let bytes = golden("gc/birth.bin", &birth.encode());
    assert_eq!(bytes, birth.encode());
    assert_eq!(Birth::decode(&bytes, &REPOSITORY).unwrap(), birth);
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        assert!(Birth::decode(&flipped, &REPOSITORY).is_err(), "flipped at {at}");
    }
    let misnamed = resealed(&bytes, |body| *body.last_mut().unwrap() = b'/');
    assert!(Birth::decode(&misnamed, &REPOSITORY).is_err());
}

/// The sizes that FORMAT.md states.
#[test]
fn sizes_are_the_documented_ones() {
    let empty = Lease { held: Vec::new(), ..lease() };
    assert_eq!(empty.encode().len(), 82);
    assert_eq!(lease().encode().len(), 82 + 2 * 9 + 4 + 4);
    assert_eq!(Birth { repository: REPOSITORY, machine: "web1".into() }.encode().len(), 31 + 4);
    let condemn = |packs: u8| GcBody::Condemn { objects: (0..packs).map(|id| ObjectRef::Pack([id; 16])).collect() };
    assert_eq!(record(41, condemn(7)).encode().len() - record(41, condemn(0)).encode().len(), 7 * 17);
}

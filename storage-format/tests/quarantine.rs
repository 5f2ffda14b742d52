//! Lists of damaged blocks: their bytes stay what they were, and damage and nonsense are refused.

mod bytes;

use bytes::{golden, resealed};
use epochfs_format::{FormatError, ObjectRef, QUARANTINED_MAX, Quarantine, quarantine_key};

const REPOSITORY: [u8; 16] = *b"0123456789abcdef";

/// Where the count of objects stands: behind magic, version and repository.
const COUNT: usize = 8 + 2 + 16;

fn list() -> Quarantine {
    let pack = (ObjectRef::Pack(*b"fedcba9876543210"), vec![(64, 100), (164, 4104), (70_000, 9)]);
    let record = (ObjectRef::Record { machine: "web1".into(), seq: 42 }, vec![(64, 1000)]);
    Quarantine { repository: REPOSITORY, objects: vec![pack, record] }
}

#[test]
fn lists_are_read_as_what_they_mean_and_written_as_they_are() {
    let bytes = golden("quarantine/list.bin", &list().encode());
    assert_eq!(bytes, list().encode());
    assert_eq!(Quarantine::decode(&bytes, &REPOSITORY).unwrap(), list());
    assert!(matches!(Quarantine::decode(&bytes, &[0; 16]), Err(FormatError::Mismatch { .. })));
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        assert!(Quarantine::decode(&flipped, &REPOSITORY).is_err(), "flipped at {at}");
        assert!(Quarantine::decode(&bytes[..at], &REPOSITORY).is_err(), "cut at {at}");
    }
    let newer = resealed(&bytes, |body| body[8] = 2);
    assert!(matches!(Quarantine::decode(&newer, &REPOSITORY), Err(FormatError::NewerVersion { found: 2, .. })));
    let longer = resealed(&bytes, |body| body.push(0));
    assert!(Quarantine::decode(&longer, &REPOSITORY).is_err());
    assert_eq!(quarantine_key(b"fedcba9876543210"), "quarantine/66656463626139383736353433323130");
}

#[test]
fn what_is_hostile_or_out_of_order_is_refused() {
    let refused = |what: &str, objects: Vec<(ObjectRef, Vec<(u32, u32)>)>| {
        let list = Quarantine { repository: REPOSITORY, objects };
        assert!(Quarantine::decode(&list.encode(), &REPOSITORY).is_err(), "{what}");
    };
    let pack = |id: u8, blocks: Vec<(u32, u32)>| (ObjectRef::Pack([id; 16]), blocks);
    refused("objects out of order", vec![pack(2, vec![(64, 9)]), pack(1, vec![(64, 9)])]);
    refused("an object twice", vec![pack(1, vec![(64, 9)]), pack(1, vec![(164, 9)])]);
    refused("no blocks", vec![pack(1, vec![])]);
    refused("blocks that overlap", vec![pack(1, vec![(64, 100), (163, 9)])]);
    refused("blocks out of order", vec![pack(1, vec![(164, 9), (64, 9)])]);
    refused("a block in the header", vec![pack(1, vec![(63, 100)])]);
    refused("a block without a payload", vec![pack(1, vec![(64, 8)])]);
    refused("a block past the end", vec![pack(1, vec![(u32::MAX, 100)])]);
    let many = |count: u32| pack(1, (0..count).map(|at| (64 + 9 * at, 9)).collect());
    refused("too many", vec![many(QUARANTINED_MAX as u32 + 1)]);
    let most = Quarantine { repository: REPOSITORY, objects: vec![many(QUARANTINED_MAX as u32)] };
    assert_eq!(Quarantine::decode(&most.encode(), &REPOSITORY).unwrap(), most);
    for at in [COUNT, COUNT + 4 + 17] {
        let hostile = resealed(&list().encode(), |body| body[at..at + 4].fill(0xff));
        assert!(Quarantine::decode(&hostile, &REPOSITORY).is_err(), "a count at {at}");
    }
}

/// The sizes that FORMAT.md states.
#[test]
fn sizes_are_the_documented_ones() {
    assert_eq!(list().encode().len(), 34 + 2 * 4 + 17 + 14 + 4 * 7);
}

//! The journal of a live: its bytes stay what they were, and hostile bytes under fitting checksums are refused or sound.

use std::fs;
use std::path::PathBuf;

use epochfs_format::{
    Attributes, FormatError, Image, JournalBase, JournalEntry, JournalKind, JournalNode, JournalReader, JournalWriter,
    ObjectRef, Place, Root, SpooledPage,
};
use proptest::prelude::*;

const ID: [u8; 16] = [0x5a; 16];

fn entries() -> Vec<JournalEntry> {
    let attributes = Attributes {
        mode: 0o640,
        owner: 7,
        group: 8,
        modified_ns: -9,
        extended: vec![(b"user.note".to_vec(), b"x".to_vec())],
    };
    let node = |id, parent, name: &[u8], kind| {
        JournalEntry::Node(JournalNode {
            id,
            parent,
            name: name.to_vec(),
            attributes: attributes.clone(),
            accessed_ns: 10,
            changed_ns: 11,
            kind,
        })
    };
    let place = Place { object: ObjectRef::Pack([3; 16]), offset: 64, len: 100 };
    let base = Image { length: 8192, root: Some(Root { digest: [4; 32], place }) };
    vec![
        JournalEntry::Base(JournalBase {
            repository: [1; 16],
            machine: "web1".into(),
            epoch: 12,
            term: 3,
            next_node: 6,
        }),
        node(1, 0, b"", JournalKind::Directory),
        node(2, 1, b"memory", JournalKind::File { length: 9000, base }),
        node(3, 1, b"link\n", JournalKind::Symlink(b"memory".to_vec())),
        JournalEntry::Zeros { node: 2, ranges: vec![(1, 2), (5, u64::MAX)] },
        JournalEntry::Pages { node: 2, pages: vec![SpooledPage { page: 0, slot: 17, check: 0x0102_0304 }] },
        JournalEntry::End,
        JournalEntry::Gone(3),
        JournalEntry::End,
    ]
}

fn encode(entries: &[JournalEntry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = JournalWriter::begin(ID, &mut bytes);
    entries.iter().for_each(|entry| writer.put(entry, &mut bytes).unwrap());
    bytes
}

fn decode(bytes: &[u8]) -> Result<Vec<JournalEntry>, FormatError> {
    let mut reader = JournalReader::new(bytes)?;
    let mut all = Vec::new();
    while let Some(entry) = reader.next()? {
        all.push(entry);
    }
    Ok(all)
}

/// One frame of any kind and body, under a checksum that fits.
fn sealed(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = encode(&[]);
    let start = bytes.len();
    bytes.extend_from_slice(b"JFRM");
    bytes.extend_from_slice(&[0; 16]);
    bytes.push(kind);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(body);
    let check = crc32c::crc32c_append(crc32c::crc32c(&ID), &bytes[start..]);
    bytes.extend_from_slice(&check.to_le_bytes());
    bytes
}

#[test]
fn the_bytes_are_those_of_version_1() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/journal/version-1.bin");
    if std::env::var_os("EPOCHFS_WRITE_VECTORS").is_some() {
        fs::write(&path, encode(&entries())).unwrap();
    }
    let golden = fs::read(&path).unwrap();
    assert_eq!(encode(&entries()), golden);
    assert_eq!(decode(&golden).unwrap(), entries());
    // Its damaged twins.
    let mut newer = golden.clone();
    newer[8] = 2;
    assert!(matches!(decode(&newer), Err(FormatError::NewerVersion { found: 2, .. })));
    let mut flipped = golden.clone();
    flipped[80] ^= 1;
    assert!(matches!(decode(&flipped), Err(FormatError::Checksum { .. })));
    assert!(matches!(decode(&golden[..20]), Err(FormatError::Truncated { .. })));
    assert!(matches!(decode(&sealed(9, &[])), Err(FormatError::Invalid { .. })));
    assert!(matches!(decode(&sealed(3, &[0; 9])), Err(FormatError::Invalid { .. })));
    assert!(matches!(decode(&sealed(4, &[[0; 8].as_slice(), &[255; 4]].concat())), Err(FormatError::Truncated { .. })));
}

#[test]
fn a_node_that_no_frame_holds_is_refused() {
    let extended = (0..70_u8).map(|name| (vec![b'a', name + 1], vec![0; 64 << 10])).collect();
    let attributes = Attributes { extended, ..Attributes::default() };
    let kind = JournalKind::Directory;
    let node = JournalNode { id: 2, parent: 1, name: b"x".to_vec(), attributes, accessed_ns: 0, changed_ns: 0, kind };
    let mut bytes = Vec::new();
    let mut writer = JournalWriter::begin(ID, &mut bytes);
    assert!(writer.put(&JournalEntry::Node(node), &mut bytes).is_err());
    writer.put(&JournalEntry::End, &mut bytes).unwrap();
    assert_eq!(decode(&bytes).unwrap(), [JournalEntry::End]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if std::env::var_os("EPOCHFS_LONG").is_some() { 100_000 } else { 3000 }))]

    #[test]
    fn any_body_under_a_fitting_checksum_is_refused_or_sound(kind in 0_u8..8, body in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(all) = decode(&sealed(kind, &body)) {
            prop_assert_eq!(decode(&encode(&all)).unwrap(), all);
        }
    }

    #[test]
    fn an_edited_body_is_refused_or_sound(which in 0_usize..7, at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let bytes = encode(&entries()[which..=which]);
        let frame = encode(&[]).len();
        let (kind, body) = (bytes[frame + 20], bytes[frame + 25..bytes.len() - 4].to_vec());
        let mut body = body;
        if !body.is_empty() {
            let at = at.index(body.len());
            body[at] = value;
        }
        if let Ok(all) = decode(&sealed(kind, &body)) {
            prop_assert_eq!(decode(&encode(&all)).unwrap(), all);
        }
    }

    #[test]
    fn any_bytes_are_refused_or_sound(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes);
        let _ = decode(&[encode(&[]), bytes].concat());
    }
}

//! Traces: their bytes stay what they were.

use std::fs;
use std::path::PathBuf;

use epochfs_format::{FormatError, Trace, TraceRun, trace_prefix, trace_seq};

const REPOSITORY: [u8; 16] = *b"0123456789abcdef";

fn trace() -> Trace {
    let runs = [(5, 1), (6, 300), (0, 2), (1 << 30, 16), (100, 1)];
    Trace {
        repository: REPOSITORY,
        stream: b"memory".to_vec(),
        epoch: 42,
        restores: 3,
        windows: vec![*b"fedcba9876543210"],
        runs: runs.map(|(first, count)| TraceRun { first, count }).to_vec(),
    }
}

#[test]
fn the_bytes_are_those_of_version_1() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/trace/version-1.bin");
    let mut bytes = Vec::new();
    trace().put(&mut bytes).unwrap();
    if std::env::var_os("EPOCHFS_WRITE_VECTORS").is_some() {
        fs::write(&path, &bytes).unwrap();
    }
    let golden = fs::read(&path).unwrap();
    assert_eq!(bytes, golden);
    assert_eq!(Trace::decode(&golden, &REPOSITORY).unwrap(), trace());
    // Its damaged twins.
    let mut newer = golden.clone();
    newer[8] = 2;
    assert!(matches!(Trace::decode(&newer, &REPOSITORY), Err(FormatError::NewerVersion { found: 2, .. })));
    let mut flipped = golden.clone();
    flipped[50] ^= 1;
    assert!(matches!(Trace::decode(&flipped, &REPOSITORY), Err(FormatError::Checksum { .. })));
    assert!(matches!(Trace::decode(&golden, &[0; 16]), Err(FormatError::Mismatch { .. })));
    assert!(Trace::decode(&[golden, vec![0]].concat(), &REPOSITORY).is_err());
}

#[test]
fn its_key_is_what_the_format_says() {
    let prefix = trace_prefix("db 1", b"memory");
    assert_eq!(prefix, "traces/db%201/912ae5aceeaaf252ec04930ee18d8afb/");
    assert_eq!(trace_seq(&format!("{prefix}000000000017")), Some(17));
    assert_eq!(trace_seq(&format!("{prefix}17")), None);
}

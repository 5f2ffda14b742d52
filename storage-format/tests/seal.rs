//! Sealed objects' shape, the keys of the objects, and what keeps the data key: bytes stay what they were, and damage is
//! refused.

mod bytes;

use bytes::{golden, resealed};
use epochfs_format::{
    FormatError, KeyRemoval, SEGMENT_LEN, SEGMENT_OVERHEAD, SEGMENT_PLAIN_LEN, WrappedKey, hex, is_never_sealed,
    key_removal_key, object_secret, objects_secret, plain_len, sealed_len, segment_claims, wrapped_key_key,
    wrapping_id, wrapping_secret,
};

const REPOSITORY: [u8; 16] = *b"0123456789abcdef";
const ID: [u8; 16] = *b"fedcba9876543210";

fn wrapped() -> WrappedKey {
    WrappedKey {
        repository: REPOSITORY,
        id: ID,
        created_ns: 1_790_000_000_123_456_789,
        nonce: [1; 12],
        wrapped: [2; 32],
        tag: [3; 16],
    }
}

fn removal() -> KeyRemoval {
    KeyRemoval { repository: REPOSITORY, number: 3, id: ID, writer: [4; 16] }
}

#[test]
fn lengths_fit_each_other_and_no_other_length_is_one() {
    let (plain, full, overhead) = (SEGMENT_PLAIN_LEN as u64, SEGMENT_LEN as u64, SEGMENT_OVERHEAD as u64);
    for (len, sealed) in [
        (0, overhead),
        (1, overhead + 1),
        (plain - 1, full - 1),
        (plain, full + overhead),
        (plain + 1, full + overhead + 1),
        (3 * plain, 3 * full + overhead),
    ] {
        assert_eq!(sealed_len(len), sealed);
        assert_eq!(plain_len(sealed), Some(len));
    }
    let mut expected = 0;
    for sealed in 0..3 * full {
        if let Some(len) = plain_len(sealed) {
            assert_eq!((len, sealed_len(len)), (expected, sealed));
            expected += 1;
        }
    }
    for cut in [0, 1, overhead - 1, full, full + 1, full + overhead - 1, 2 * full] {
        assert_eq!(plain_len(cut), None, "{cut}");
    }
    assert_eq!(segment_claims(0x0102, true), [2, 1, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(segment_claims(0, false), [0; 9]);
}

#[test]
fn keys_of_objects_are_what_they_were() {
    let objects = objects_secret(&[7; 32]);
    let derived = [
        objects,
        object_secret(&objects, "packs/66/66656463626139383736353433323130"),
        object_secret(&objects, "gc/log/0000000000000001"),
        wrapping_secret(&[9; 32]),
    ];
    let text =
        derived.iter().map(|secret| format!("{}\n", secret.iter().map(|b| format!("{b:02x}")).collect::<String>()));
    let text = text.collect::<String>() + &hex(&wrapping_id(&[9; 32], &REPOSITORY)) + "\n";
    assert_eq!(golden("sealed/keys.txt", text.as_bytes()), text.as_bytes());
    assert_ne!(wrapping_id(&[9; 32], &REPOSITORY), wrapping_id(&[9; 32], &ID));
    assert!(is_never_sealed("epochfs.json") && is_never_sealed(&wrapped_key_key(&ID)));
    assert!(is_never_sealed(&key_removal_key(1)) && !is_never_sealed("packs/00/00") && !is_never_sealed("keys"));
    assert_eq!(wrapped_key_key(&ID), "keys/66656463626139383736353433323130");
    assert_eq!(key_removal_key(12), "keys/removals/0000000000000012");
}

#[test]
fn wrapped_keys_and_removals_are_read_as_what_they_mean_and_damage_is_refused() {
    let key = golden("sealed/wrapped-key.bin", &wrapped().encode());
    assert_eq!(key, wrapped().encode());
    assert_eq!(WrappedKey::decode(&key, &REPOSITORY, &ID).unwrap(), wrapped());
    assert!(key.starts_with(&WrappedKey::claims(&REPOSITORY, &ID, wrapped().created_ns)));
    assert!(matches!(WrappedKey::decode(&key, &REPOSITORY, &[0; 16]), Err(FormatError::Invalid { .. })));
    assert!(matches!(WrappedKey::decode(&key, &[0; 16], &ID), Err(FormatError::Mismatch { .. })));
    let gone = golden("sealed/removal.bin", &removal().encode());
    assert_eq!(gone, removal().encode());
    assert_eq!(KeyRemoval::decode(&gone, &REPOSITORY, 3).unwrap(), removal());
    assert!(matches!(KeyRemoval::decode(&gone, &REPOSITORY, 4), Err(FormatError::Invalid { .. })));
    type Decode = fn(&[u8]) -> bool;
    let both: [(&[u8], Decode); 2] = [
        (&key, |bytes| WrappedKey::decode(bytes, &REPOSITORY, &ID).is_ok()),
        (&gone, |bytes| KeyRemoval::decode(bytes, &REPOSITORY, 3).is_ok()),
    ];
    for (bytes, is_sound) in both {
        assert!(is_sound(bytes));
        for at in 0..bytes.len() {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 0x10;
            assert!(!is_sound(&flipped) && !is_sound(&bytes[..at]), "at {at}");
        }
        assert!(!is_sound(&resealed(bytes, |body| body.push(0))) && !is_sound(&resealed(bytes, |body| body[8] = 2)));
    }
}

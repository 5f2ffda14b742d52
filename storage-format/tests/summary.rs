//! Summaries of logs: their bytes stay what they were, and damage is refused.

mod bytes;

use std::collections::BTreeMap;

use bytes::{golden, resealed};
use epochfs_format::{FormatError, Summary, summary_key, summary_span};

const REPOSITORY: [u8; 16] = *b"0123456789abcdef";

fn summary(to: u64, removed: bool) -> Summary {
    let from = to - summary_span(to);
    let mut tags = BTreeMap::from([("golden".to_owned(), Some(3)), ("nightly".to_owned(), Some(to))]);
    if !removed && from > 0 {
        tags.insert("old".to_owned(), None);
    }
    Summary {
        machine: "web1".into(),
        from,
        to,
        digest: [7; 32],
        removed,
        epochs: (from + 1..=to).filter(|epoch| epoch % 5 > 0).collect(),
        dropped: (1..=from).filter(|epoch| !removed && epoch % 3 == 0).collect(),
        tags,
    }
}

fn all() -> [(&'static str, Summary); 3] {
    [("first", summary(16, false)), ("later", summary(48, false)), ("removed", summary(80, true))]
}

#[test]
fn summaries_are_read_as_what_they_mean_and_written_as_they_are() {
    for (name, summary) in all() {
        let bytes = golden(&format!("summary/{name}.bin"), &summary.encode(&REPOSITORY));
        assert_eq!(bytes, summary.encode(&REPOSITORY), "{name}");
        let decode = |bytes: &[u8]| Summary::decode(bytes, &REPOSITORY, "web1", summary.to);
        assert_eq!(decode(&bytes).unwrap(), summary);
        let elsewhere = [
            Summary::decode(&bytes, &[0; 16], "web1", summary.to),
            Summary::decode(&bytes, &REPOSITORY, "web2", summary.to),
            Summary::decode(&bytes, &REPOSITORY, "web1", summary.to + 16),
        ];
        assert!(elsewhere.iter().all(|decoded| matches!(decoded, Err(FormatError::Mismatch { .. }))));
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert!(decode(&flipped).is_err(), "{name} flipped at {at}");
            assert!(decode(&bytes[..at]).is_err(), "{name} cut at {at}");
        }
        assert!(matches!(decode(&resealed(&bytes, |body| body[8] = 2)), Err(FormatError::NewerVersion { .. })));
        assert!(matches!(decode(&resealed(&bytes, |body| body.push(0))), Err(FormatError::Invalid { .. })));
    }
}

#[test]
fn bodies_under_a_fitting_checksum_are_refused_or_have_one_encoding() {
    for (name, summary) in all() {
        let bytes = summary.encode(&REPOSITORY);
        let mut accepted = 0;
        for at in 0..bytes.len() - 4 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let changed = resealed(&bytes, |body| body[at] = value);
                if let Ok(decoded) = Summary::decode(&changed, &REPOSITORY, "web1", summary.to) {
                    assert_eq!(decoded.encode(&REPOSITORY), changed, "{name}: {value} at {at}");
                    accepted += 1;
                }
            }
        }
        // The digest can be anything.
        assert!(accepted >= 32 * 5, "{name}: {accepted}");
    }
}

#[test]
fn what_its_records_cannot_tell_is_refused() {
    let good = summary(48, false);
    let bad = [
        Summary { epochs: [good.from].into_iter().collect(), ..good.clone() },
        Summary { epochs: [good.to + 1].into_iter().collect(), ..good.clone() },
        Summary { dropped: [good.from + 1].into_iter().collect(), ..good.clone() },
        Summary { removed: true, tags: BTreeMap::new(), ..good.clone() },
        Summary { tags: BTreeMap::from([("late".into(), Some(good.to + 1))]), ..good.clone() },
        Summary { tags: BTreeMap::from([("17".into(), Some(1))]), ..good.clone() },
        Summary { removed: true, dropped: Default::default(), ..good.clone() },
    ];
    for summary in bad {
        let bytes = summary.encode(&REPOSITORY);
        assert!(Summary::decode(&bytes, &REPOSITORY, "web1", good.to).is_err(), "{summary:?}");
    }
    assert_eq!(summary_key("db 1", 32), "machines/db%201/summaries/0000000000000032");
}

//! Feeds a decoder with whatever libFuzzer makes up. `EPOCHFS_FUZZ` names the structure, as the golden vectors do.
//!
//! Checksums are made to fit, so that the fuzzer meets what is behind them. What is accepted must be written again, as
//! the same bytes where there is one encoding of each value, and read as the same value.

#![no_main]

#[path = "../tests/vectors/mod.rs"]
mod vectors;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use vectors::{Target, parts, targets};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("EPOCHFS_FUZZ").expect("EPOCHFS_FUZZ names a structure");
    let mut all = targets();
    all.extend(parts());
    let names: Vec<&str> = all.iter().map(|target| target.name).collect();
    let Some(index) = names.iter().position(|known| *known == name) else {
        panic!("EPOCHFS_FUZZ={name} is not one of {names:?}");
    };
    // Inputs are bodies, without the checksums that are put round them here.
    if let Some(seeds) = std::env::var_os("EPOCHFS_FUZZ_SEEDS") {
        let seed = all[index].seal.open(&all[index].bytes);
        std::fs::write(std::path::Path::new(&seeds).join("golden"), seed).expect("the seed directory can be written");
    }
    all.swap_remove(index)
});

fuzz_target!(init: { LazyLock::force(&TARGET); }, |body: &[u8]| {
    let bytes = TARGET.seal.close(body);
    let Ok(value) = (TARGET.decode)(&bytes) else { return };
    let Some(again) = value.again() else { return };
    if TARGET.canonical {
        assert!(again == bytes, "two encodings of {}", value.view());
        let back = (TARGET.decode)(&again).expect("what was written is read");
        assert!(back.view() == value.view(), "what was written says something else");
    }
});

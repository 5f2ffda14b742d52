//! Golden bytes of small objects, and bytes that are changed under a checksum that fits.

use std::fs;
use std::path::PathBuf;

/// The committed file; where there is none, it is written if that is asked for.
pub fn golden(name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
    if !path.exists() && std::env::var_os("EPOCHFS_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; EPOCHFS_BLESS=1 writes it", path.display()))
}

/// The bytes with a checksum that fits.
pub fn resealed(bytes: &[u8], edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut body = bytes[..bytes.len() - 4].to_vec();
    edit(&mut body);
    let check = crc32c::crc32c(&body);
    body.extend_from_slice(&check.to_le_bytes());
    body
}

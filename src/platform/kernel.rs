//! Which kernel this is.

/// Its version, as far as it says one.
pub fn version() -> Option<(u32, u32)> {
    version_of(&rustix::system::uname().release().to_string_lossy())
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|letter: char| !letter.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version_of("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version_of("5.4"), Some((5, 4)));
        assert_eq!(version_of("six"), None);
        assert!(version().is_some());
    }
}

//! Keys as text: hexadecimal digits or base64, one a line.

use super::Secret;

/// The keys that a text has: one a line; empty lines and comments (`#`) are nothing. Exactly 32 bytes that are no text are a
/// key as they are. The error says what is wrong, and nothing of what is there.
pub fn parse(bytes: &[u8]) -> Result<Vec<Secret>, String> {
    let no_key = || "it holds no key: 64 hexadecimal digits, or 32 bytes in base64".to_owned();
    let is_text = bytes.iter().all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
    if let (Ok(raw), false) = (<[u8; 32]>::try_from(bytes), is_text) {
        return Ok(vec![Secret::new(raw)]);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| no_key())?;
    let mut keys = Vec::new();
    for (number, line) in text.lines().map(str::trim).enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let key = from_hex(line).or_else(|| from_base64(line));
        let key =
            key.ok_or_else(|| format!("line {} is no key: 64 hexadecimal digits, or 32 bytes in base64", number + 1))?;
        keys.push(Secret::new(key));
    }
    if keys.is_empty() { Err(no_key()) } else { Ok(keys) }
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut key = [0; 32];
    for (byte, pair) in key.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(key)
}

/// The usual alphabet or that of URLs, with padding or without.
fn from_base64(text: &str) -> Option<[u8; 32]> {
    let text = text.strip_suffix('=').unwrap_or(text);
    if text.len() != 43 {
        return None;
    }
    let mut key = [0; 32];
    let (mut bits, mut count, mut at) = (0_u32, 0, 0);
    for byte in text.bytes() {
        let six = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            *key.get_mut(at)? = (bits >> count) as u8;
            bits &= (1 << count) - 1;
            at += 1;
        }
    }
    // The last digit holds two bits of nothing.
    (at == key.len() && bits == 0).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<[u8; 32]> {
        parse(text.as_bytes()).unwrap().iter().map(|key| *key.bytes()).collect()
    }

    #[test]
    fn a_key_is_read_as_digits_or_base64_or_as_it_is() {
        let key: [u8; 32] = std::array::from_fn(|at| (at * 37) as u8);
        let hex = "00254a6f94b9de03284d7297bce1062b50759abfe4092e53789dc2e70c31567b";
        let base64 = "ACVKb5S53gMoTXKXvOEGK1B1mr/kCS5TeJ3C5wwxVns=";
        assert_eq!(parsed(hex), [key]);
        assert_eq!(parsed(&hex.to_uppercase()), [key]);
        assert_eq!(parsed(base64), [key]);
        assert_eq!(parsed(base64.trim_end_matches('=')), [key]);
        assert_eq!(parsed(&base64.replace('/', "_")), [key]);
        assert_eq!(parsed(&format!("# the first\n\n {hex} \r\n# the second\n{base64}\n")), [key, key]);
        assert_eq!(parse(&key).unwrap()[0].bytes(), &key);
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_repeated() {
        let hex = "00254a6f94b9de03284d7297bce1062b50759abfe4092e53789dc2e70c31567b";
        let long = format!("{hex}0");
        for bad in ["", "\n\n", "# nothing", "secret", &hex[1..], &long, &hex.replace('0', "g")] {
            let error = parse(bad.as_bytes()).unwrap_err();
            assert!(!error.contains("secret") && !error.contains(&hex[4..20]), "{error}");
        }
        assert!(parse(&[0xff; 33]).is_err());
        // Bits behind the end of the key.
        assert!(parse(b"ACVKb5S53gMoTXKXvOEGK1B1mr/kCS5TeJ3C5wwxVnt").is_err());
    }
}

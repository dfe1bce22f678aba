package stream

import (
	"fmt"
	"hash/crc32"
	"net/http"
	"strconv"
	"strings"
)

// httpSeed is the seed of every body that ServeHTTP sends.
const httpSeed = 0x68747470

// ServeHTTP answers GET /N with N bytes, whose checksum BodyCRC knows.
func ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseUint(strings.TrimPrefix(r.URL.Path, "/"), 10, 40)
	if err != nil {
		http.Error(w, fmt.Sprintf("want /N, the number of bytes, got %q", r.URL.Path), http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Length", strconv.FormatUint(n, 10))
	w.Header().Set("Content-Type", "application/octet-stream")
	p, buf := NewPattern(httpSeed), make([]byte, chunk)
	for off := uint64(0); off < n; off += chunk {
		b := buf[:min(chunk, n-off)]
		p.Fill(b, off)
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// BodyCRC is the CRC-32C of the first n bytes that ServeHTTP sends.
func BodyCRC(n uint64) uint32 {
	p, buf := NewPattern(httpSeed), make([]byte, chunk)
	var sum CRC
	for off := uint64(0); off < n; off += chunk {
		b := buf[:min(chunk, n-off)]
		p.Fill(b, off)
		_, _ = sum.Write(b)
	}
	return sum.Sum
}

// CRC is an io.Writer that keeps the CRC-32C of what was written: under emulation, ten times as fast as a SHA-256.
type CRC struct{ Sum uint32 }

// Write never fails.
func (c *CRC) Write(b []byte) (int, error) {
	c.Sum = crc32.Update(c.Sum, castagnoli, b)
	return len(b), nil
}

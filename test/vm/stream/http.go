package stream

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// httpSeed is the seed of every body that ServeHTTP sends.
const httpSeed = 0x68747470

// ServeHTTP answers GET /N with N bytes, whose SHA-256 BodySum knows.
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

// BodySum is the SHA-256, in hexadecimal, of the first n bytes that ServeHTTP sends.
func BodySum(n uint64) string {
	h, p, buf := sha256.New(), NewPattern(httpSeed), make([]byte, chunk)
	for off := uint64(0); off < n; off += chunk {
		b := buf[:min(chunk, n-off)]
		p.Fill(b, off)
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil))
}

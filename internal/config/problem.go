package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong about a file.
type Problem struct {
	Line int    // from 1; 0: none in particular
	Key  string // with its tables, port.vm1.mtu; "" if the text could not be read
	Err  error
}

// Problems is the error of a file: all that is wrong about it, in the order of its lines.
type Problems struct {
	Name string // of the file
	List []Problem
}

// Error has a line for each Problem.
func (e *Problems) Error() string {
	list := make([]string, len(e.List))
	for i, p := range e.List {
		at := e.Name
		if p.Line > 0 {
			at = fmt.Sprintf("%s:%d", e.Name, p.Line)
		}
		if p.Key != "" {
			at += ": " + p.Key
		}
		list[i] = fmt.Sprintf("%s: %v", at, p.Err)
	}
	return strings.Join(list, "\n")
}

// Unwrap implements errors' interface.
func (e *Problems) Unwrap() []error {
	var errs []error
	for _, p := range e.List {
		errs = append(errs, p.Err)
	}
	return errs
}

// Blame takes note of what is wrong about a key, which is named with its tables, or about a table. Several errors that were joined
// are several problems.
func (f *File) Blame(key string, err error) {
	if err == nil {
		return
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range many.Unwrap() {
			f.Blame(key, err)
		}
		return
	}
	f.problems = append(f.problems, Problem{f.line(key), key, err})
}

// line is where a key stands, or else the table that it would stand in.
func (f *File) line(key string) int {
	for key != "" {
		if n := f.lines[key]; n > 0 {
			return n
		}
		key = key[:max(strings.LastIndexByte(key, '.'), 0)]
	}
	return 0
}

// Err is nil, or a *Problems.
func (f *File) Err() error {
	if len(f.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(f.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Key, b.Key))
	})
	return &Problems{f.Name, f.problems}
}

// suggest is the end of an error about a word that is not one of known: which one may have been meant, or all.
func suggest(word string, known []string) string {
	best, least := "", 1+max(len(word)/2, 1)
	for _, k := range known {
		if d := distance(word, k); d < least {
			best, least = k, d
		}
	}
	if best != "" {
		return fmt.Sprintf(": did you mean %s?", best)
	}
	return ": known are " + strings.Join(known, ", ")
}

// distance counts the letters that have to be added, removed or replaced to make b of a (Levenshtein's). A word of which half was
// left out, as is a habit of people, is one apart.
func distance(a, b string) int {
	if len(a) > 2 && strings.HasPrefix(b, a) || strings.HasSuffix(b, "-"+a) || strings.HasSuffix(b, "."+a) || strings.HasPrefix(a, b+"-") {
		return 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		left := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := left
			if a[i] != b[j] {
				cost++
			}
			left = row[j+1]
			row[j+1] = min(cost, left+1, row[j]+1)
		}
	}
	return row[len(b)]
}

func contains(list []string, s string) bool { return slices.Contains(list, s) }

// errEmpty is for a key that has to be left out where it says nothing.
var errEmpty = errors.New("is empty: leave it out, or say what you want")

package config

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"time"
)

// key is all that there is to know about a key of a table, whose values together are a T.
type key[T any] struct {
	name  string             // with dots, if it stands in a table within the table
	form  string             // what is wanted, for people; "" where the type and the bounds say it
	field func(*T) any       // a pointer to what it sets: *string, *int, *bool, *time.Duration, *[]string or *[]int
	lo    int64              // the least number, or duration in ns
	hi    int64              // and the most
	check func(string) error // of a string, or of each in a list
	live  bool               // a port that runs takes a new value at once
}

type keys[T any] []key[T]

func (ks keys[T]) names() []string {
	list := make([]string, len(ks))
	for i, k := range ks {
		list[i] = k.name
	}
	return list
}

func (ks keys[T]) find(name string) *key[T] {
	for i := range ks {
		if ks[i].name == name {
			return &ks[i]
		}
	}
	return nil
}

func (ks keys[T]) without(names ...string) keys[T] {
	return slices.DeleteFunc(slices.Clone(ks), func(k key[T]) bool { return slices.Contains(names, k.name) })
}

// read sets in o what a table says. path is the table's.
func (ks keys[T]) read(f *File, path string, table map[string]any, o *T) {
	ks.readIn(f, path, "", table, o)
}

// readIn reads a table within the table, whose keys begin with prefix.
func (ks keys[T]) readIn(f *File, path, prefix string, table map[string]any, o *T) {
	for name, v := range table {
		at, name := path+"."+prefix+name, prefix+name
		k := ks.find(name)
		inner, isTable := v.(map[string]any)
		switch {
		case k != nil:
			f.Blame(at, k.set(o, v))
		case isTable && slices.ContainsFunc(ks, func(k key[T]) bool { return strings.HasPrefix(k.name, name+".") }):
			ks.readIn(f, path, name+".", inner, o)
		default:
			f.Blame(at, fmt.Errorf("unknown key%s", suggest(name, ks.names())))
		}
	}
}

// set sets the field of k in o.
func (k *key[T]) set(o *T, v any) error {
	switch field := k.field(o).(type) {
	case *string:
		return k.text(field, v)
	case *int:
		n, err := k.number(v)
		*field = n
		return err
	case *bool:
		b, ok := v.(bool)
		if !ok {
			return fmt.Errorf("want true or false, not %s", typeOf(v))
		}
		*field = b
	case *time.Duration:
		return k.duration(field, v)
	case *[]string:
		return each(k, field, v, func(s *string, v any) error { return k.text(s, v) })
	case *[]int:
		return each(k, field, v, func(n *int, v any) (err error) { *n, err = k.number(v); return })
	default:
		panic(fmt.Sprintf("bug: key %s sets a %T", k.name, field))
	}
	return nil
}

func (k *key[T]) text(field *string, v any) error {
	s, ok := v.(string)
	switch {
	case !ok && k.form != "":
		return fmt.Errorf("want a string, %s, not %s", k.form, typeOf(v))
	case !ok:
		return fmt.Errorf("want a string, not %s", typeOf(v))
	case s == "":
		return errEmpty
	}
	if k.check != nil {
		if err := k.check(s); err != nil {
			return err
		}
	}
	*field = s
	return nil
}

func (k *key[T]) number(v any) (int, error) {
	n, ok := v.(int64)
	if k.hi == unbounded && k.lo == 0 && (!ok || n < 0) {
		return 0, fmt.Errorf("want 0 or more, not %s", strings.TrimPrefix(typeOf(v), "the number "))
	}
	if !ok {
		return 0, fmt.Errorf("want a number from %d to %d, not %s", k.lo, k.hi, typeOf(v))
	}
	if n < k.lo || n > k.hi {
		return 0, fmt.Errorf("want a number from %d to %d, not %d", k.lo, k.hi, n)
	}
	return int(n), nil
}

func (k *key[T]) duration(field *time.Duration, v any) error {
	lo, hi := time.Duration(k.lo), time.Duration(k.hi)
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("want a string with a duration from %v to %v, not %s", lo, hi, typeOf(v))
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < lo || d > hi {
		return fmt.Errorf("want a duration from %v to %v, not %q", lo, hi, s)
	}
	*field = d
	return nil
}

// each reads a list, whose elements one sets.
func each[T, E any](k *key[T], field *[]E, v any, one func(*E, any) error) error {
	list, ok := v.([]any)
	if !ok {
		return fmt.Errorf("want a list, [ %s ], not %s", k.form, typeOf(v))
	}
	var errs []error
	*field = make([]E, len(list))
	for i, v := range list {
		if err := one(&(*field)[i], v); err != nil {
			errs = append(errs, fmt.Errorf("element %d: %w", i+1, err))
		}
	}
	return errors.Join(errs...)
}

// typeOf names a TOML value's type for people.
func typeOf(v any) string {
	switch v := v.(type) {
	case string:
		return fmt.Sprintf("the string %q", v)
	case int64:
		return fmt.Sprintf("the number %d", v)
	case float64:
		return fmt.Sprintf("the fraction %v", v)
	case bool:
		return fmt.Sprintf("%v", v)
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}

// differ lists the keys of which a and b have different values, those that a running port takes at once and the others.
func (ks keys[T]) differ(a, b *T) (live, other []string) {
	for _, k := range ks {
		x, y := reflect.ValueOf(k.field(a)).Elem(), reflect.ValueOf(k.field(b)).Elem()
		switch {
		case same(x, y):
		case k.live:
			live = append(live, k.name)
		default:
			other = append(other, k.name)
		}
	}
	return live, other
}

// same compares two fields. An empty list is as good as none.
func same(x, y reflect.Value) bool {
	if x.Kind() == reflect.Slice && x.Len() == 0 && y.Len() == 0 {
		return true
	}
	return reflect.DeepEqual(x.Interface(), y.Interface())
}

// oneOf checks that a string is one of a few.
func oneOf(words ...string) func(string) error {
	return func(s string) error {
		if !slices.Contains(words, s) {
			return fmt.Errorf("want %s, not %q", strings.Join(words, " or "), s)
		}
		return nil
	}
}

// unbounded is the upper bound of what has none of its own.
const unbounded = math.MaxInt64
